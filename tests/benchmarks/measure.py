"""Ratios of alternating runs, so that a noisy machine disturbs both sides alike."""

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table

from hf_gated_sae.functional.cpu.features import CPU


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


def turns(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of several runs that take turns in rotating order, after one warm-up each."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(several) for name, several in times.items()}


def machine() -> str:
    """Return one line about the machine: a ratio holds for CPUs of its kind only."""
    return f"{CPU}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def show(title: str, rows: list[tuple[str, float, float]]) -> None:
    """Print measured ratios beside their limits, and on which machine."""
    table = Table("what", "measured", "limit", title=title, caption=machine())
    for what, measured, limit in rows:
        table.add_row(what, f"{measured:.3f}", f"{limit:.2f}")
    Console(width=100).print(table)
