"""Runs that fail: the error says why, and no result is lost."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, TrainingError
from hf_gated_sae.training import SAETrainer, TensorActivations
from hf_gated_sae.training.memory import TrainingMemory

from .runs import log, run, trainer, weights
from .test_trainer import quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow


class At(TrainerCallback):
    """Calls a function with the model before a given step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(kwargs["model"])


class Poisoned(TensorActivations):
    """Returns a NaN in the seventh batch; the sample that is checked at the start has none."""

    def batches(self, batch_size):
        for number, batch in enumerate(super().batches(batch_size)):
            if number == 6:
                batch[""][17, 3] = float("nan")
            yield batch


def poison(name, place, value):
    def act(model):
        dict(model.named_parameters())[name].data[place] = value

    return act


def spoil_gradient(model):
    model.b_gate.register_hook(lambda grad: grad.index_fill(0, torch.tensor([9]), float("inf")))


@pytest.mark.parametrize(
    ("action", "names"),
    [
        (poison("W_enc_T", (7, 2), float("nan")), "the parameter W_enc_T at latent 7 is nan"),
        (poison("b_dec", 4, float("inf")), "the parameter b_dec at index 4 is inf"),
        (poison("W_dec", (3, 3), 1e30), "the term 'reconstruction' of the loss is inf"),
        (spoil_gradient, "the gradient of b_gate at latent 9 is inf"),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_first_nonfinite_value_is_named(arguments, action, names, clip):
    sae = build("gated", D_IN)
    args = arguments(max_grad_norm=clip)
    made = quiet(SAETrainer(sae, args, activations(500, seed=0), callbacks=[At(4, action)]))
    with pytest.raises(TrainingError, match=f"Step 4 was stopped before it changed any weight: {names}"):
        made.train()
    assert made.state.global_step == 3


def test_a_nonfinite_activation_is_located_in_its_batch(arguments):
    sae = build("gated", D_IN)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.update({name: tensor.clone() for name, tensor in sae.state_dict().items()})

    stream = Poisoned(activations(500, seed=0))
    args = arguments(activation_scale="none", save_strategy="steps", save_steps=3)
    with pytest.raises(TrainingError, match="Step 7 .*activation 17 of 64 at the given site is nan.*checkpoint-6"):
        quiet(SAETrainer(sae, args, stream, callbacks=[Keep()])).train()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in sae.state_dict().items())


def test_the_diverged_one_of_several_saes_is_named(tmp_path):
    made = trainer(tmp_path, At(2, lambda model: dict(model.items())["a/standard"].b_enc.data.fill_(float("nan"))))
    with pytest.raises(TrainingError, match="b_enc at latent 0 is nan in the SAE 'a/standard'"):
        made.train()


def limited(folder, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        run(folder, False)
    except CheckpointError as error:
        Path(folder, "error").write_text(str(error))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The checkpoint outgrows the limit on file sizes while inputs are kept for resampling."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    trainer(whole).train()
    sizes = [
        max(path.stat().st_size for path in (whole / f"checkpoint-{step}").rglob("*")) for step in range(4, 40, 4)
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs"])
    limit = sizes[0] + 100
    failing = 4 + 4 * next(number for number, size in enumerate(sizes) if size > limit)
    assert failing > 4
    child = context.Process(target=limited, args=(str(folder), limit))
    child.start()
    child.join(60)
    error = (folder / "error").read_text()
    assert f"checkpoint-{failing} could not be written" in error
    assert f"newest whole checkpoint is {folder}/checkpoint-{failing - 4}" in error
    assert sorted(path.name for path in folder.iterdir()) == [
        *sorted(f"checkpoint-{step}" for step in range(4, failing, 4)),
        "error",
    ]
    trainer(folder).train(resume_from_checkpoint=True)  # without the limit
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert log(folder) == log(whole)


def test_running_out_of_memory_is_explained(arguments):
    class Starved(SAETrainer):
        def compute_loss(self, *args, **kwargs):
            return torch.empty(1 << 55)  # more than any device has

    sae = build("gated", D_IN)
    with pytest.raises(
        TrainingError,
        match="Memory ran out at step 0. Weights, gradients and moments take .*"
        "activation_batch_size=32 would fit into",
    ):
        quiet(Starved(sae, arguments(), activations(500, seed=0))).train()


def test_memory_estimate():
    sae = build("gated", 8, 48)
    memory = TrainingMemory.of([sae])
    parameters = 2 * 8 * 48 + 3 * 48 + 8
    assert memory.total(0) == 4 * 4 * parameters
    batch = memory.largest_batch(memory.total(0) + 10**6)
    assert memory.total(batch) <= memory.total(0) + 10**6 < memory.total(batch + 1)
    assert "About 50% of the latents" in memory.advice(64, memory.total(0) // 2)
    assert memory.largest_batch(0) == 0 and "Reduce activation_batch_size" in memory.advice(64, None)


def test_a_run_saves_the_facts_that_a_card_needs(arguments, tmp_path):
    from hf_gated_sae.publishing.facts import CardFacts

    sae = build("gated", D_IN)
    made = quiet(SAETrainer(sae, arguments(gradient_accumulation_steps=2), activations(500, seed=0)))
    made.train()
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "training_args.json", "training_facts.json"),
    }
    saved = SAEModel.from_pretrained(folder)
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert saved.config.recorded_tokens == 500
    facts = CardFacts.from_dict(json.loads((folder / "training_facts.json").read_text()))
    assert facts.training["steps"] == 10 and facts.training["activations"] == 10 * 2 * 64
    assert facts.training["objective"]["frozen_decoder"] is True
    assert facts.metrics["l0"] == pytest.approx(saved.config.recorded_l0) and facts.evaluation["tokens"] == 500
    assert facts.training["seconds"] > 0 and str(tmp_path) not in json.dumps(facts.to_dict())


class SampledOnce(TensorActivations):
    """Can be sampled once, for scale and centre; a second sample raises an error."""

    error: BaseException | None = None

    def sample(self, count):
        if self.error is not None:
            raise self.error
        self.error = self.later
        return super().sample(count)


@pytest.mark.parametrize("error", [InputError("the data set answers no more"), KeyboardInterrupt()])
def test_a_result_is_saved_without_statistics_that_cannot_be_recorded(arguments, tmp_path, error):
    stream = SampledOnce(activations(500, seed=0), seed=0)
    stream.later = error
    sae = build("gated", D_IN)
    strengths = torch.full((sae.config.d_sae,), 7.0)
    sae.record_statistics(strengths, strengths / 2, 12_345)  # left from an earlier training
    with pytest.raises((TrainingError, KeyboardInterrupt)) as ended:
        quiet(SAETrainer(sae, arguments(), stream)).train()
    if isinstance(error, InputError):
        assert "could not be recorded (the data set answers no more)" in str(ended.value)
        assert ended.value.__cause__ is error
    saved = SAEModel.from_pretrained(tmp_path / "run")
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert not saved.config.recorded_tokens and not saved.max_activation.any() and sae.W_dec.grad is None
    facts = json.loads((tmp_path / "run" / "training_facts.json").read_text())
    assert facts["training"]["steps"] == 10 and "metrics" not in facts


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_are_unscaled_before_they_are_clipped(arguments, monkeypatch, clip):
    """As with fp16 on a GPU, which scales the loss by 65,536; here only the scaler is used, on a CPU."""
    moved, norms = [], []
    for scale in (None, 1024.0):
        sae = build("standard", D_IN).double()
        before = sae.W_enc_T.detach().clone()
        args = arguments(max_steps=1, max_grad_norm=clip, optim="sgd", learning_rate=1.0, logging_steps=1)
        made = quiet(SAETrainer(sae, args, activations(500, seed=0).double()))
        if scale is not None:
            made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            monkeypatch.setattr(made.accelerator, "native_amp", True)
            monkeypatch.setattr(type(made.accelerator), "mixed_precision", "fp16")
            monkeypatch.setattr(made.accelerator, "autocast", contextlib.nullcontext)
            monkeypatch.setattr(made.accelerator, "prepare_model", lambda model, **_: model)
        made.train()
        moved.append(sae.W_enc_T.detach() * made.trainees[""].scale_in - before)
        norms.append(made.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
