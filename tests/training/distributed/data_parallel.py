"""The same runs of `SAETrainer` in two processes, and in one with batches twice as large."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.distributed import DistributedConfig

from hf_gated_sae import SAEModel
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import CheckpointError, InputError
from hf_gated_sae.training import ModelActivations, SAETrainer, SAETrainingArguments, TensorActivations, checkpoints
from hf_gated_sae.training.processes import Processes
from hf_gated_sae.training.run import Run, assemble, measured
from hf_gated_sae.training.sharding import GatheredActivations, load_part
from tests.hooks.distributed.ranks import RANKS, gathered, require_alike, run
from tests.support.tiny_models import tiny_model
from tests.training.worlds import D_IN, activations, build

STEPS = 24
RESAMPLED = {"resample_steps": [9, 17], "resample_inputs": 256, "lr_dip_steps": 9}
ANNEALED = {
    "sparsity_power_end": 0.7,
    "sparsity_power_steps": [5, 15],
    "sparsity_power_changes": 3,
    "sparsity_power_batches": 4,
}
DYING = {"gradient_accumulation_steps": 2, "dead_after_activations": 130}
"""Latents die and revive within a step: between its parts, and at different times in the two processes."""
RUNS = {
    "resampled": (("gated", "standard", "jumprelu"), {**RESAMPLED, "initial_b_dec": "geometric_median"}),
    "annealed": (("gated", "standard"), {**ANNEALED, "dead_latent_remedy": None}),
    "by the batch": (("batch_topk", "topk"), {"dead_latent_remedy": "auxk"}),
    "auxk": (("gated",), {"dead_latent_remedy": "auxk", "auxk_coefficient": 1.0}),
    "ghosts": (("standard",), {"dead_latent_remedy": "ghost_gradients"}),
    "pulled": (("gated",), {"dead_latent_remedy": "pre_activation_pull", "pull_coefficient": 0.1}),
    "accumulated": (("gated",), {**RESAMPLED, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
    "auxk, accumulated": (("gated", "topk"), {**DYING, "dead_latent_remedy": "auxk", "auxk_coefficient": 1.0}),
    "ghosts, accumulated": (("standard",), {**DYING, "dead_latent_remedy": "ghost_gradients"}),
    "pulled, accumulated": (("gated",), {**DYING, "dead_latent_remedy": "pre_activation_pull"}),
}
SPLIT = {
    "resampled": RUNS["resampled"],
    "annealed": RUNS["annealed"],
    "accumulated": (
        ("gated", "standard"),
        {**RESAMPLED, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "recorded_activations": 300},
    ),
}
"""Runs whose SAEs can be split over the processes."""
CLOSE = 1e-8  # in float64; only the order of sums differs


def trainer(folder, architectures, batch=32, stream=None, **changes):
    saes = dict(architectures) if isinstance(architectures, dict) else {}
    for name in () if saes else architectures:
        sae = build(name, D_IN, 48).to(torch.float64)
        for bias in ("b_gate", "b_enc"):
            if hasattr(sae, bias):
                getattr(sae, bias).data[::5] = -1e4  # latents that are dead from the beginning
        saes[name] = sae
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": STEPS,
        "activation_batch_size": batch,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "sparsity_warmup_steps": 4,
        "sparsity_coefficient": 0.5,
        "dead_after_activations": 200,
        "resample_steps": [],
        "logging_steps": 6,
        "statistics_activations": 600,
        "recorded_activations": 0,
    }
    given = TensorActivations(activations(700, seed=0, scale=20.0).double(), seed=1) if stream is None else stream
    made = SAETrainer(saes.get("", saes), SAETrainingArguments(**{**settings, **changes}), given)
    made.remove_callback(PrinterCallback)
    return made


def logged(made):
    return [entry for entry in made.state.log_history if "grad_norm" in entry]


def read_from(folder, model, batch=32, **changes):
    """Train on activations of a language model, without measuring them first."""
    ids = torch.randint(3, 90, (12, 4, 16), generator=torch.Generator().manual_seed(5))
    stream = ModelActivations(model, "resid_post.1", list(ids), buffer_size=256)
    sae = build("gated", model.config.hidden_size, 48, site="resid_post.1").to(torch.float64)
    settings = {"activation_scale": "none", "initial_b_dec": "zero", "statistics_activations": 64, "max_steps": 12}
    made = trainer(folder, {"": sae}, batch, stream, **settings, **changes)
    made.train()
    return made


def alone(folder):
    """Train every run in one process, and save the results."""
    model = tiny_model("llama", vocab_size=98).double()  # older versions of transformers need an even size
    model.save_pretrained(folder / "llama")
    read_from(folder / "read", model)
    for name, (architectures, settings) in RUNS.items():
        made = trainer(folder / name, architectures, 64, **settings)
        made.train()
        (folder / name / "log.json").write_text(json.dumps(logged(made)))
    architectures, settings = SPLIT["accumulated"]
    trainer(folder / "recorded", architectures, 64, **settings).train()


def require_same(folder, made, name):
    """Fail unless a trainer's saved SAEs and log equal those of the run in one process."""
    for sae in made.trainees:
        expected = SAEModel.from_pretrained(folder / name / sae).state_dict()
        found = SAEModel.from_pretrained(Path(made.args.output_dir) / sae).state_dict()
        start = build(sae, D_IN, 48).state_dict()
        for key, tensor in expected.items():
            scale = max(1.0, tensor.abs().max().item())
            assert (found[key] - tensor).abs().max() <= CLOSE * scale, (sae, key)
        assert (expected["W_dec"] - start["W_dec"]).abs().max() > 1e-2
    for found, expected in zip(logged(made), json.loads((folder / name / "log.json").read_text()), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-8), key


def prepare(folder):
    return folder, Processes.all()


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def half_the_batch_in_each_of_two_processes(given):
    folder, everyone = given
    for name, (architectures, settings) in RUNS.items():
        made = trainer(folder / f"{name}, together", architectures, 32, **settings)
        assert made.args.world_size == RANKS
        made.train()
        everyone.barrier()
        require_same(folder, made, name)
        for trainee in made.trainees.values():
            require_alike(trainee.dead.silent_for)
            for tensor in trainee.sae.state_dict().values():
                require_alike(tensor)
        if "resample_steps" in settings:
            assert gathered(made.trainees["gated"].remedy.resampled)[0] > 5


@check
def half_the_latents_in_each_of_two_processes(given):
    folder, everyone = given
    for name, (architectures, settings) in SPLIT.items():
        made = trainer(folder / f"{name}, split", architectures, 64, latent_parallel=2, **settings)
        made.train()
        everyone.barrier()
        require_same(folder, made, name) if name != "accumulated" else None
        for trainee in made.trainees.values():
            assert trainee.sae.W_dec.shape == (24, D_IN)
            require_alike(trainee.sae.b_dec.detach())
        if "resample_steps" in settings:
            assert sum(gathered(made.trainees["gated"].remedy.resampled)) > 5
    for sae in ("gated", "standard"):
        expected, found = (SAEModel.from_pretrained(folder / run / sae) for run in ("recorded", "accumulated, split"))
        for key, tensor in expected.state_dict().items():
            assert (found.state_dict()[key] - tensor).abs().max() <= CLOSE * max(1.0, tensor.abs().max().item()), key
        for fact in ("recorded_l0", "recorded_fvu", "recorded_norm", "recorded_tokens"):
            assert getattr(found.config, fact) == pytest.approx(getattr(expected.config, fact), rel=1e-5), fact


@check
def a_resumed_run_is_bitwise_equal(given):
    folder, everyone = given
    for latents in (1, 2):
        settings = {**RESAMPLED, "latent_parallel": latents, "save_strategy": "steps", "save_steps": 8}
        place = folder / f"resumed {latents}"
        made = trainer(place, ("gated",), 32, **settings)
        made.train()
        expected = {name: tensor.clone() for name, tensor in made.trainees["gated"].sae.state_dict().items()}
        everyone.barrier()
        again = trainer(place, ("gated",), 32, **settings)
        again.train(resume_from_checkpoint=str(place / "checkpoint-8"))
        for name, tensor in again.trainees["gated"].sae.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        other = trainer(place, ("gated",), 32, **{**settings, "latent_parallel": 3 - latents})
        with pytest.raises(CheckpointError, match=f"latent_parallel was {latents} and is {3 - latents}"):
            other.train(resume_from_checkpoint=str(place / "checkpoint-8"))
        everyone.barrier()
    part = load_part(folder / "resumed 2", "gated", processes=everyone)
    assert torch.equal(part.W_dec, made.trainees["gated"].sae.W_dec)


@check
def a_base_model_split_over_the_same_processes_reads_one_text(given):
    folder, _ = given
    split = AutoModelForCausalLM.from_pretrained(
        folder / "llama", distributed_config=DistributedConfig(tp_size=RANKS), dtype=torch.float64
    ).eval()
    made = read_from(folder / "read, split", split, 32, latent_parallel=2)
    assert made.grid.model_processes == 2
    assert made.grid.readers.alone
    expected, found = (SAEModel.from_pretrained(folder / run) for run in ("read", "read, split"))
    for key, tensor in expected.state_dict().items():
        assert (found.state_dict()[key] - tensor).abs().max() <= CLOSE, key
    with pytest.raises(InputError, match="split over 2 processes, which all read the same text, and 1 share an SAE"):
        read_from(folder / "refused", split)


class Uneven(TensorActivations):
    """Returns samples in pieces, some with fewer rows than there are processes, or none."""

    def sample(self, count):
        for piece in super().sample(count):
            for site, x in piece.items():
                for part in x.split([100, 1, 0, 1, 1, *[7] * ((len(x) - 103) // 7), (len(x) - 103) % 7]):
                    yield {site: part}


@check
def a_sample_does_not_end_with_a_small_piece(given):
    _, everyone = given
    x = activations(700, seed=0)
    for wanted in (300, 700):
        own = Uneven(x, seed=3).shard(everyone.rank, RANKS)
        sample = torch.cat([each[""] for each in GatheredActivations(own, everyone, everyone).sample(wanted)])
        assert wanted - 4 <= len(sample) <= wanted
        require_alike(sample)
        assert len(torch.cdist(sample, x).min(1).indices.unique()) == len(sample), "no row twice"


@check
def every_process_begins_with_the_saes_of_the_first(given):
    folder, everyone = given
    for latents in (1, 2):
        mine = build("gated", D_IN, 48).double()
        for tensor in mine.state_dict().values():
            tensor += 0.01 * everyone.rank
        mine.W_dec = torch.nn.Parameter(mine.W_dec.detach().T.contiguous().T)  # any memory layout is allowed
        made = trainer(folder / "alike", {"": mine}, 32, latent_parallel=latents, max_steps=4)
        made.train()
        for name in ("b_dec", *(("W_dec", "b_gate") if latents == 1 else ())):
            require_alike(made.trainees[""].sae.state_dict()[name])


@check
def gradients_of_any_memory_layout_are_averaged(given):
    _, everyone = given
    module = torch.nn.Linear(6, 4, bias=False)
    module.weight.grad = torch.full((6, 4), float(everyone.rank)).T
    everyone.average_gradients(module)
    assert torch.equal(module.weight.grad, torch.full((4, 6), 0.5))


@check
def dead_latents_are_counted_in_all_parts(given):
    folder, everyone = given
    made = trainer(folder / "counted", ("standard",), 64, latent_parallel=2, dead_latent_remedy=None, max_steps=6)
    made.trainees["standard"].sae.b_enc.data[:10] = -1e4
    made.train()
    # `train` returns in each process only after process 0 has written the file.
    facts = json.loads((folder / "counted" / "standard" / "training_facts.json").read_text())
    assert facts["training"]["dead_latents"] == logged(made)[-1]["standard/dead_latents"] >= 20
    require_alike(torch.tensor(made.trainees["standard"].count_dead()))


@check
def each_process_verifies_a_part_of_a_checkpoint(given):
    folder, everyone = given
    place = folder / "shared"
    trainer(place, ("gated",), 32, save_strategy="steps", save_steps=STEPS).train()
    checkpoint, read = place / f"checkpoint-{STEPS}", []
    fingerprint = checkpoints._fingerprint
    checkpoints._fingerprint = lambda path: read.append(path.name) or fingerprint(path)
    try:
        checkpoints.verify(checkpoint, everyone)
        names = gathered(read)
        expected = {path.name for path in checkpoint.rglob("*") if path.is_file()} - {checkpoints.MANIFEST}
        assert {*names[0], *names[1]} == expected and abs(len(names[0]) - len(names[1])) <= 1
        if everyone.rank == 0:
            (checkpoint / "process-1.safetensors").write_bytes(b"")
        everyone.barrier()
        with pytest.raises(CheckpointError, match="process-1.safetensors has 0 bytes") as caught:
            trainer(place, ("gated",), 32, save_strategy="steps", save_steps=STEPS).train(str(checkpoint))
    finally:
        checkpoints._fingerprint = fingerprint
    first, second = gathered(str(caught.value))
    assert first == second


@check
def a_run_makes_no_whole_sae_in_any_process(given):
    folder, everyone = given
    text = folder / "train.txt"
    if everyone.rank == 0:
        text.write_text("\n\n".join(corpus.texts("training", 40_000)), encoding="utf-8")
    everyone.barrier()
    given = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(bundled.MODEL), "hub_id": "none"},
        "data": {"files": str(text), "documents": "paragraph", "context_length": 32, "sequences_per_batch": 4},
        "sae": {"site": "resid_post.1"},
        "saes": {"a": {"d_sae": 48}, "b": {"d_sae": 64, "architecture": "standard"}},
        "training": {"latent_parallel": 2, "max_steps": 3, "activation_batch_size": 32, "use_cpu": True},
    }
    given["data"]["buffer_size"] = 128
    given["training"] |= {"statistics_activations": 100, "recorded_activations": 100, "disable_tqdm": True}
    ready = Run.prepare(assemble(given))
    assert [sae.W_dec.shape[0] for sae in ready.saes.values()] == [24, 32]
    assert "48 latents" in ready.facts()["a"]
    assert measured(ready.config).parameters["a"] == sum(each.numel() for each in ready.saes["a"].parameters())
    ready.train(quiet=True)
    everyone.barrier()
    trained = ready.trained("a")
    assert trained.W_dec.shape[0] == 48 and torch.equal(
        trained.W_dec[24 * everyone.rank :][:24], ready.saes["a"].W_dec
    )
    first, second = gathered(ready.saes["a"].W_dec.detach())
    assert (first @ second.T).abs().max() < 0.999, "no direction twice"


@check
def no_more_is_sent_than_needed(given):
    folder, _ = given

    def messages(steps, **settings):
        made = trainer(folder / "counted", ("gated", "standard"), 32, **{"max_steps": steps, **settings})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            made.train()
        return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))

    def per_step(**settings):
        return (messages(18, **settings) - messages(12, **settings)) / 6

    assert per_step(logging_steps=100) == 2  # one for the gradients, and one more
    shared = per_step(logging_steps=100, latent_parallel=2)
    # The batch; for each SAE its reconstructions (two and one), sparsity and gradient of b_dec; one gradient norm.
    assert shared == 1 + (2 + 1 + 1) + (1 + 1 + 1) + 1


if __name__ == "__main__":
    run(CHECKS, prepare)
