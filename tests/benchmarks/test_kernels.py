"""Time and memory of encoding and decoding, beside the peers: 4,096 tokens, 2,304 x 16,384, about 64 active latents.

Each implementation runs in its own process with the same weights; two at a time take turns. The peers run in the
environment that `make test-peers` makes; without it only their rows are skipped.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.benchmarks.kernels import D_IN, D_SAE, TOKENS
from tests.benchmarks.measure import show
from tests.benchmarks.workers import ROUNDS, Worker

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("kernels.py")
DENSE = 4 * TOKENS * D_SAE
NONE = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for 64 active latents of 16,384: projections are standard normal, and that share exceeds 2.66."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    b_dec = randn(D_IN, scale=0.1)
    tensors = {
        "x": randn(TOKENS, D_IN) + b_dec,
        "W_enc_T": randn(D_SAE, D_IN, scale=D_IN**-0.5),
        "W_dec": randn(D_SAE, D_IN, scale=D_IN**-0.5),
        "b_dec": b_dec,
        "b_gate": randn(D_SAE, scale=0.05) - 2.66,
        "b_mag": randn(D_SAE, scale=0.05) - 1.5,
        "r_mag": randn(D_SAE, scale=0.1),
        "b_enc": randn(D_SAE, scale=0.05) - 0.5,
        "threshold": torch.full((D_SAE,), 2.16),
    }
    path = tmp_path_factory.mktemp("kernels")
    save_file(tensors, path / "weights.safetensors")
    return path


@pytest.fixture
def compare(folder: Path) -> Iterator[Any]:
    """Return a function for the ratio of two implementations' median times, which checks that their results agree."""

    def compared(candidate: str, reference: str, tolerance: float = 1e-4) -> float:
        with Worker(SCRIPT, candidate, folder) as ours, Worker(SCRIPT, reference, folder) as theirs:
            found, wanted = (torch.tensor(way.ask("check")["values"]) for way in (ours, theirs))
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
            times = []
            for turn in range(ROUNDS):
                ways = (ours, theirs) if turn % 2 else (theirs, ours)
                seconds = {way: way.ask("run")["seconds"] for way in ways}
                times.append((seconds[ours], seconds[theirs]))
        mine, others = zip(*times, strict=True)
        return statistics.median(mine) / statistics.median(others)

    yield compared


TITLE = f"encode + decode, {TOKENS} tokens, {D_IN} x {D_SAE}, L0 64"


@pytest.mark.parametrize(
    "candidate, reference, limit",
    [
        ("ours_gated", "saelens_gated", 0.25),
        ("ours_gated", "dictionary_learning_gated", 0.35),
        ("ours_jumprelu", "torch_jumprelu", 0.4),
        ("ours_topk", "sparsify_topk", 0.6),
    ],
)
def test_encode_and_decode(compare: Any, candidate: str, reference: str, limit: float) -> None:
    measured = compare(candidate, reference)
    show(TITLE, [(f"{candidate} / {reference}", measured, limit)])
    assert measured <= limit


def test_bfloat16_and_the_screen(compare: Any) -> None:
    """The screen also multiplies in bfloat16, so SAEs in bfloat16 gain less over it than over the full product."""
    rows = [
        ("bfloat16 / float32 without screen", compare("ours_gated_bf16", "ours_gated_unscreened", 0.15), 0.6),
        ("bfloat16 / float32", compare("ours_gated_bf16", "ours_gated", 0.15), NONE),
        ("float32 / float32 without screen", compare("ours_gated", "ours_gated_unscreened"), 1.0),
        ("sae.reconstruct(x) / sae(x)", compare("ours_gated", "ours_gated_whole"), 1.0),
    ]
    show(TITLE, rows)
    assert not any(measured > limit for _, measured, limit in rows)


def test_memory(folder: Path) -> None:
    rows = []
    for what, limit in [
        ("ours_gated_live", 0.25),
        ("ours_gated", NONE),
        ("ours_topk", NONE),
        ("torch_jumprelu", NONE),
    ]:
        with Worker(SCRIPT, what, folder) as way:
            rows.append((f"{what}: peak extra memory, result included", way.ask("memory")["bytes"] / DENSE, limit))
    show(f"memory / a dense [{TOKENS}, {D_SAE}]", rows)
    assert not any(measured > limit for _, measured, limit in rows)
