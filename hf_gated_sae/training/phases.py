"""The phases of a run, and reporting their progress to callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

from torch import Tensor
from transformers import TrainerCallback


class Phase(StrEnum):
    """Work of a run besides its steps; the values are shown to users."""

    SCALE = "measuring the scale"
    FILL = "filling the buffer"
    HELD_OUT = "measuring held-out text"
    RECORD = "recording latents"


Report = Callable[[Phase, int, int], None]
"""Called with a phase, the amount done and the total amount, in activations or in tokens."""


class PhaseCallback(TrainerCallback):
    """A callback of the trainer that also receives the progress of phases between steps."""

    def on_phase(self, phase: Phase, done: int, total: int) -> None:
        """Show the progress of a phase; it has ended once `done` reaches `total`."""


def counted(
    pieces: Iterable[Mapping[str, Tensor]], report: Report, phase: Phase, total: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield activations ``[n, d]`` by site and report their number; the end is always reported."""
    done = 0
    report(phase, 0, total)
    for piece in pieces:
        yield piece
        done += len(next(iter(piece.values())))
        report(phase, min(done, total), total)
    if done < total:
        report(phase, total, total)
