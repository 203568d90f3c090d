"""Time and memory of a training step of 768 x 24,576, about 64 active latents, beside peers and a lower bound.

Each implementation runs in its own process with the same weights; all in a table take turns. The peers run in the
environment that `make test-peers` makes; without it the comparisons with them are skipped.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.benchmarks.measure import show
from tests.benchmarks.train import D_IN, D_SAE
from tests.benchmarks.training_steps import ON, PLAIN, plain, weights
from tests.benchmarks.workers import ROUNDS, Worker

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

SCRIPT = Path(__file__).with_name("train.py")
NONE = float("nan")
SIZES = (2048, 4096)
CHECKED = 512
EXACT, HALF = 1e-4, 0.02


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights by case: about 64 active latents per activation, or an eighth of all."""
    found = {case: tmp_path_factory.mktemp(case) for case in ON}
    for case, path in found.items():
        save_file(weights(case), path / "weights.safetensors")
    return found


@functools.cache
def expected(architecture: str, case: str) -> dict[str, float]:
    return plain(architecture, weights(case), CHECKED)


def medians(folder: Path, ways: Sequence[str], tokens: int) -> dict[str, float]:
    """Return median seconds of a step of several implementations that take turns in rotating order."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as running:
        workers = {way: running.enter_context(Worker(SCRIPT, way, folder)) for way in ways}
        for worker in workers.values():
            worker.ask(f"run {tokens}")  # allocates the optimiser's moments
        for turn in range(ROUNDS):
            first = turn % len(ways)
            for way in (*ways[first:], *ways[:first]):
                times[way].append(workers[way].ask(f"run {tokens}")["seconds"])
    return {way: statistics.median(several) for way, several in times.items()}


def compare(title: str, measured: dict[str, float], limits: Sequence[tuple[str, str, float]]) -> None:
    """Show ratios and require that none is above its limit."""
    rows = [(f"{way} / {of}", measured[way] / measured[of], limit) for way, of, limit in limits]
    show(title, rows)
    assert not [row for row in rows if row[1] > row[2]]


def title(tokens: int, case: str = "sparse") -> str:
    on = "L0 64" if case == "sparse" else "an eighth of all latents active"
    return f"a training step, {tokens} tokens, {D_IN} x {D_SAE}, {on}"


WAYS = [(f"ours_{architecture}", EXACT) for architecture in PLAIN]
THEIRS = ("saelens_gated", "dictionary_learning_gated", "sparsify_topk", "saelens_topk", "dictionary_learning_topk")


@pytest.mark.parametrize(
    "way, case, tolerance",
    [
        *((way, "sparse", tolerance) for way, tolerance in WAYS),
        *((way, "sparse", HALF) for way in ("ours_gated_bf16", "ours_topk_bf16")),
        ("ours_gated", "early", EXACT),
        *((way, "sparse", EXACT) for way in THEIRS),
    ],
)
def test_all_compute_the_plain_equations(folders: dict[str, Path], way: str, case: str, tolerance: float) -> None:
    """Compares every term and gradient norm of ours, and the terms that the peers have."""
    architecture = next(name for name in sorted(PLAIN, key=len, reverse=True) if name in way)
    wanted = expected(architecture, case)
    with Worker(SCRIPT, way, folders[case]) as worker:
        found = worker.ask(f"check {CHECKED}")
    if way.startswith("ours"):
        assert set(found) == set(wanted)
    shared = {name: (found[name], value) for name, value in wanted.items() if name in found}
    assert "reconstruction" in shared
    off = {name: pair for name, pair in shared.items() if not math.isclose(*pair, rel_tol=tolerance)}
    assert not off


@pytest.mark.parametrize("tokens", SIZES)
def test_gated(folders: dict[str, Path], tokens: int) -> None:
    ways = ("ours_gated", "dictionary_learning_gated", "saelens_gated", "ours_product", "torch_product")
    compare(
        title(tokens),
        medians(folders["sparse"], ways, tokens),
        [
            ("ours_gated", "dictionary_learning_gated", 0.15),
            ("ours_gated", "saelens_gated", 0.1),
            ("ours_gated", "ours_product", 2.5),
            ("ours_product", "torch_product", NONE),
            ("saelens_gated", "dictionary_learning_gated", NONE),
        ],
    )


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("ours, peers", [("ours_gated", ["saelens_gated_bf16"]), ("ours_topk", [])])
def test_in_bfloat16(folders: dict[str, Path], ours: str, peers: list[str], tokens: int) -> None:
    """Weights and moments in float32, products in bfloat16; the other peers do not support it on a CPU."""
    candidate, product = f"{ours}_bf16", "torch_product_bf16"
    compare(
        f"{title(tokens)}, bfloat16 autocast",
        medians(folders["sparse"], (candidate, product, ours, *peers), tokens),
        [
            *((candidate, peer, 0.1) for peer in peers),
            (candidate, product, 2.5),
            (candidate, ours, NONE),
        ],
    )


@pytest.mark.parametrize("tokens", SIZES)
def test_topk(folders: dict[str, Path], tokens: int) -> None:
    """sparsify with its default optimiser, which keeps one moment where Adam keeps two, and with Adam."""
    peers = ("sparsify_topk", "sparsify_topk_adam", "saelens_topk", "dictionary_learning_topk")
    ours = ("ours_topk", "ours_product")
    compare(
        title(tokens),
        medians(folders["sparse"], (*ours, *peers), tokens),
        [
            ("ours_topk", "sparsify_topk", 0.6),
            *(("ours_topk", peer, NONE) for peer in peers[1:]),
            ("ours_topk", "ours_product", 2.5),
        ],
    )


def test_the_other_architectures(folders: dict[str, Path]) -> None:
    ways = ("ours_standard", "ours_jumprelu", "ours_batch_topk")
    measured = medians(folders["sparse"], (*ways, "ours_product"), max(SIZES))
    compare(title(max(SIZES)), measured, [(way, "ours_product", 2.5) for way in ways])


@pytest.mark.parametrize("tokens", SIZES)
def test_early_in_training(folders: dict[str, Path], tokens: int) -> None:
    ways = ("ours_gated", "dictionary_learning_gated", "saelens_gated")
    compare(
        title(tokens, "early"),
        medians(folders["early"], ways, tokens),
        [("ours_gated", "dictionary_learning_gated", 1.0), ("ours_gated", "saelens_gated", NONE)],
    )


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize(
    "candidate, peers",
    [
        ("ours_gated", ("dictionary_learning_gated", "saelens_gated")),
        ("ours_gated_bf16", ("dictionary_learning_gated", "saelens_gated_bf16")),
        ("ours_topk", ("sparsify_topk", "dictionary_learning_topk", "saelens_topk")),
    ],
)
def test_memory(folders: dict[str, Path], candidate: str, peers: Sequence[str], tokens: int) -> None:
    """Growth of the process at its peak, with weights, gradients and moments; TopK has no limit."""
    measured = {}
    for way in (candidate, *peers):
        with Worker(SCRIPT, way, folders["sparse"]) as worker:
            measured[way] = worker.ask(f"memory {tokens}")["bytes"] / 1e6
    better = min(peers, key=lambda peer: measured[peer])
    megabytes = [(f"{way}: MB", value, NONE) for way, value in measured.items()]
    limit = NONE if candidate == "ours_topk" else 0.6
    ratio = measured[candidate] / measured[better]
    show(f"peak memory of {title(tokens)}", [(f"{candidate} / {better}", ratio, limit), *megabytes])
    assert not ratio > limit
