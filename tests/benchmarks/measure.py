"""Ratios of alternating runs, so that a noisy machine disturbs both sides alike."""

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table


def ratio(candidate: Callable[[], object], reference: Callable[[], object], *, rounds: int) -> float:
    """Median time of `candidate` over median time of `reference`, measured in turns after one warm-up each."""
    times: dict[str, list[float]] = {"candidate": [], "reference": []}
    candidate(), reference()
    for turn in range(rounds):
        order = [("candidate", candidate), ("reference", reference)]
        for name, run in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["candidate"]) / statistics.median(times["reference"])


def show(title: str, rows: list[tuple[str, float, float]]) -> None:
    """Print measured ratios beside their limits."""
    table = Table("what", "measured", "limit", title=title)
    for what, measured, limit in rows:
        table.add_row(what, f"{measured:.3f}", f"{limit:.2f}")
    Console(width=100).print(table)
