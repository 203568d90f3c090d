"""The phases of a run, and how whoever watches it hears of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

from torch import Tensor
from transformers import TrainerCallback


class Phase(StrEnum):
    """What a run does besides its steps; the values are what people read."""

    SCALE = "measuring the scale"
    FILL = "filling the buffer"
    HELD_OUT = "measuring held-out text"
    RECORD = "recording latents"


Report = Callable[[Phase, int, int], None]
"""Is called with a phase, how much of it is done, and how much there is in all: in activations, or in tokens."""


class PhaseCallback(TrainerCallback):
    """A callback of the trainer that also hears of the phases between its steps."""

    def on_phase(self, phase: Phase, done: int, total: int) -> None:
        """Show how far a phase is; it has ended once `done` reaches `total`."""


def counted(
    pieces: Iterable[Mapping[str, Tensor]], report: Report, phase: Phase, total: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield activations ``[n, d]`` by site, and report how many there were; the end is reported in any case."""
    done = 0
    report(phase, 0, total)
    for piece in pieces:
        yield piece
        done += len(next(iter(piece.values())))
        report(phase, min(done, total), total)
    if done < total:
        report(phase, total, total)
