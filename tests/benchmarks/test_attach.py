"""Time that interventions add to GPT-2-small and a Llama of the size of 1B, in a forward and in decoding."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from hf_gated_sae import Ablate, Clamp, GatedSAE, GatedSAEConfig, Splice, Steer, attach, capture
from hf_gated_sae.demo import bundled
from tests.benchmarks.measure import show, turns
from tests.benchmarks.models import gpt2_small, llama_1b
from tests.benchmarks.splicing import COLUMNS, D_IN, D_SAE, LAYER, ROWS
from tests.benchmarks.workers import ROUNDS, Worker

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("splicing.py")
L0, NEW_TOKENS = 64, 24
NONE = float("nan")


def realistic(x: torch.Tensor, d_sae: int) -> dict[str, torch.Tensor]:
    """Return weights of a Gated SAE with about `L0` active latents at each of the activations ``[..., d_in]``."""
    x = x.float().reshape(-1, x.shape[-1])
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[-1]), dim=-1)
    projections = (x[:256] - x.mean(0)) @ W_dec.T
    gate = float(projections.topk(L0 + 1, dim=-1).values[:, -1].median())
    biases = {"b_gate": -gate, "b_mag": -gate / 2, "r_mag": 0.1}
    return {
        "W_enc_T": W_dec,
        "W_dec": W_dec.clone(),
        "b_dec": x.mean(0),
        **{name: torch.full((d_sae,), value) for name, value in biases.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-small with random weights, ids, and an SAE for it."""
    path = tmp_path_factory.mktemp("splicing")
    torch.manual_seed(0)
    model = gpt2_small()
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(bundled.MODEL).save_pretrained(path)  # the peer loads it
    ids = torch.randint(0, 50_000, (ROWS, COLUMNS))
    site = f"resid_post.{LAYER}"
    tensors = realistic(capture(model, site, input_ids=ids)[site], D_SAE)
    save_file({"ids": ids, **tensors}, path / "sae.safetensors")
    return path


def added(worker: Worker) -> Callable[[str], float]:
    """Return a function that measures how much longer a forward takes than a plain one just before it."""

    def measure(command: str) -> float:
        plain, attached = worker.ask("plain"), worker.ask(command)
        return float(attached["seconds"]) - float(plain["seconds"])

    return measure


def test_splice_against_saelens(folder: Path) -> None:
    with Worker(SCRIPT, "ours", folder) as ours, Worker(SCRIPT, "saelens", folder) as theirs:
        for command in ("plain", "splice", "error"):
            found, wanted = (torch.tensor(worker.ask(command)["values"]) for worker in (ours, theirs))
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        times: dict[tuple[str, str], list[float]] = {}
        for turn in range(ROUNDS):
            workers = [("ours", ours), ("theirs", theirs)]
            for name, worker in workers if turn % 2 else reversed(workers):
                for command in ("splice", "error"):
                    times.setdefault((name, command), []).append(added(worker)(command))
                times.setdefault((name, "plain"), []).append(float(worker.ask("plain")["seconds"]))
    median = {key: statistics.median(several) for key, several in times.items()}
    rows = [
        (f"time added by Splice{how} / by SAELens", median["ours", command] / median["theirs", command], limit)
        for command, how, limit in (("splice", "", 0.3), ("error", " with the error term", 0.15))
    ]
    shares = [
        (f"{name}: forward with {command} / plain forward", 1 + median[name, command] / median[name, "plain"], NONE)
        for name in ("ours", "theirs")
        for command in ("splice", "error")
    ]
    show(f"GPT-2-small, {D_IN} x {D_SAE} Gated SAE, batch {ROWS} x {COLUMNS}", rows + shares)
    assert not any(measured > limit for _, measured, limit in rows)


MODELS = {"GPT-2-small": (gpt2_small, 24_576, 21), "Llama 1B in bfloat16": (llama_1b, 32_768, 5)}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, GatedSAE, int]:
    """A model by name, an SAE for it, and how often to measure."""
    make, d_sae, rounds = MODELS[request.param]
    model = make()
    site = f"resid_post.{model.config.num_hidden_layers // 2}"
    ids = torch.randint(3, 30_000, (2, 64))
    x = capture(model, site, input_ids=ids)[site]
    sae = GatedSAE(GatedSAEConfig(d_in=x.shape[-1], d_sae=d_sae, site=site)).eval()
    sae.load_state_dict(realistic(x, d_sae), strict=False)
    sae.record_statistics(torch.ones(d_sae), torch.ones(d_sae), tokens=1)
    return request.param, model, sae, rounds


@torch.no_grad()
def test_edits_of_a_few_latents_are_almost_free(case: tuple[str, Any, GatedSAE, int]) -> None:
    name, model, sae, rounds = case
    ids = torch.randint(3, 30_000, (2, 128))
    some = list(range(16))
    edits = {
        "Ablate": Ablate(sae, some),
        "Clamp": Clamp(sae, dict.fromkeys(some, 2.0)),
        "Steer": Steer(sae, 1),
    }
    attached = {verb: attach(model, edit) for verb, edit in edits.items()} | {"Splice": attach(model, Splice(sae))}

    def forward() -> None:
        model(ids, use_cache=False)

    def decode() -> None:
        model.generate(
            ids[:1, :16], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )

    def within(verb: str, run: Callable[[], None]) -> Callable[[], None]:
        def edited() -> None:
            with attached[verb]:
                run()

        return edited

    rows = []
    for what, run, limit in (("forward", forward, 1.02), ("greedy decoding", decode, 1.03)):
        runs = {"plain": run, **{verb: within(verb, run) for verb in attached}}
        measured = turns(runs, rounds=rounds)
        rows += [
            (f"{verb}, {what}", measured[verb] / measured["plain"], NONE if verb == "Splice" else limit)
            for verb in attached
        ]
    show(f"{name}, edits of up to 16 latents; 1.0 = nothing attached", rows)
    assert not any(measured > limit for _, measured, limit in rows)
