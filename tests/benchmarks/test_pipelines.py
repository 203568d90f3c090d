"""Time around a training step: the trainer, reading activations, and a whole run beside the peers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from hf_gated_sae import capture
from hf_gated_sae.demo import bundled
from hf_gated_sae.hooks.harvest import harvest
from hf_gated_sae.training import SAETrainer, SAETrainingArguments, TensorActivations, decoder_norm
from tests.benchmarks import pipelines
from tests.benchmarks.measure import ratio, show
from tests.benchmarks.models import gpt2_small
from tests.benchmarks.test_attach import realistic
from tests.benchmarks.train import RATE, our_sae
from tests.benchmarks.training_steps import weights
from tests.benchmarks.workers import ROUNDS, Worker

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

SCRIPT = Path(__file__).with_name("pipelines.py")
NONE = float("nan")
MILLISECONDS = 5.0


class Steps(TrainerCallback):
    """Times whole steps, from the end of one to the end of the next, and their parts that a bare step also has.

    The difference is what the trainer adds. As the difference of two long runs it would be lost in their noise.
    """

    def __init__(self) -> None:
        self.bare, self.left = 0.0, None
        self.steps: list[tuple[float, float]] = []

    def counted(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to that of the bare step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*args, **kwargs)
            finally:
                self.bare += time.perf_counter() - start

        return run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.left is not None:
            self.steps.append((now - self.left, self.bare))
        self.left, self.bare = now, 0.0


@pytest.mark.parametrize(
    "d_in, d_sae, tokens, steps", [(64, 256, 1024, 300), (768, 24_576, 2048, 20), (768, 24_576, 4096, 20)]
)
def test_what_the_trainer_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d_in: int, d_sae: int, tokens: int, steps: int
) -> None:
    """Time beyond objective, backward pass, constraint, optimiser and clearing of gradients; logging is off."""
    w = weights("sparse", d_in, d_sae, 4 * tokens)
    args = SAETrainingArguments(**pipelines.bare_run(str(tmp_path), steps, tokens, RATE))
    clock = Steps()
    trainer = SAETrainer(our_sae("gated", w), args, TensorActivations(w["x"]), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainee = trainer.trainees[""]
    parts = ((trainee, "loss"), (trainer.accelerator, "backward"), (decoder_norm, "before_step"))
    parts += ((trainer.create_optimizer(), "step"), (decoder_norm, "after_step"), (trainee.sae, "zero_grad"))
    for owner, name in parts:
        monkeypatch.setattr(owner, name, clock.counted(getattr(owner, name)))
    trainer.train()
    added = 1000 * statistics.median(whole - bare for whole, bare in clock.steps[2:])
    bare = 1000 * statistics.median(bare for _, bare in clock.steps[2:])
    rows = [("added by the trainer, ms", added, MILLISECONDS), ("a bare step, ms", bare, NONE)]
    show(f"a step of SAETrainer, {tokens} tokens, {d_in} x {d_sae}", rows)
    assert bare > 0 and added < MILLISECONDS


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 5, 10])
def test_harvest_costs_the_bare_layers(layer: int) -> None:
    model = gpt2_small()
    bare = copy.deepcopy(model.transformer)
    bare.h, bare.ln_f = bare.h[: layer + 1], torch.nn.Identity()
    ids = torch.randint(3, 30_000, (8, 128))
    site = f"resid_post.{layer}"

    def harvested() -> Any:
        return next(iter(harvest(model, site, [ids], special_tokens=True)))[site]

    def layers() -> Any:
        return bare(ids, use_cache=False).last_hidden_state

    torch.testing.assert_close(harvested(), layers().flatten(0, 1), rtol=1e-4, atol=1e-4)
    measured = ratio(harvested, layers, rounds=2 * ROUNDS)
    show(f"harvest in GPT-2-small, {list(ids.shape)} tokens", [(f"{site} / {layer + 1} bare layers", measured, 1.2)])
    assert measured <= 1.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with random weights, ids, and weights of SAEs with about 64 active latents."""
    path = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=pipelines.D_IN,
        intermediate_size=3 * pipelines.D_IN,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
        initializer_range=pipelines.D_IN**-0.5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path / "model")
    AutoTokenizer.from_pretrained(bundled.MODEL).save_pretrained(path / "model")  # a peer loads it
    ids = torch.randint(3, 1024, (64 * pipelines.ROWS, pipelines.CONTEXT))
    site = f"resid_post.{pipelines.LAYER}"
    with torch.no_grad():
        x = capture(model, site, input_ids=ids[:16])[site]
    save_file({"ids": ids, **realistic(x, pipelines.D_SAE)}, path / "weights.safetensors")
    return path


def tokens_per_second(folder: Path, ways: Sequence[str], rounds: int) -> dict[str, float]:
    """Return medians over runs that take turns, from the difference of a long and a short run."""
    served = pipelines.BUFFER // 2  # both lengths end when a served half of the buffer does
    short, long = served, 3 * served
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways if turn % 2 else reversed(ways):
            with Worker(SCRIPT, way, folder) as worker:
                worker.ask(f"run {served}")
                seconds = [worker.ask(f"run {steps}")["seconds"] for steps in (short, long)]
            times[way].append((seconds[1] - seconds[0]) / (long - short))
    return {way: pipelines.TOKENS / statistics.median(several) for way, several in times.items()}


@pytest.mark.parametrize(
    "candidate, peers", [("ours_gated", ["saelens_gated"]), ("ours_topk", ["sparsify_topk", "saelens_topk"])]
)
def test_from_tokens_to_a_trained_sae(folder: Path, candidate: str, peers: list[str]) -> None:
    measured = tokens_per_second(folder, [candidate, *peers], rounds=3)
    better = max(peers, key=lambda peer: measured[peer])
    gain = measured[candidate] / measured[better]
    rows = [(f"{candidate} / {better}, tokens/s (limit: minimum)", gain, 2.0)]
    rows += [(f"{way}: thousand tokens/s", value / 1000, NONE) for way, value in measured.items()]
    show(f"a whole run, Llama of 4 layers of {pipelines.D_IN}, SAE {pipelines.D_IN} x {pipelines.D_SAE}", rows)
    assert gain >= 2.0
