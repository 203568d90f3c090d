"""How long the rest of a run takes: its steps, and what is read between them, each at a speed of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

SMOOTHING = 0.05
"""The share of the latest step in the mean of all: what steps take falls as fewer latents are on."""


class Pace:
    """Foresees the end of the steps of a run.

    Activations come out of a buffer, which is filled up whenever it is half empty: some steps wait for that, most do
    not, and at first none does. So steps and reading are timed apart.

    Args:
        now: the time in seconds.

    Attributes:
        seconds_per_step: of the steps alone.
        seconds_per_row: of reading an activation into the buffer.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.seconds_per_step: float | None = None
        self.seconds_per_row = 0.0
        self.seconds_per_pause = 0.0
        self._rows = self._seconds = 0.0
        self._size = self._held = 0
        self._began: float | None = None
        self._filled: tuple[float, int] | None = None

    def filling(self, held: int, size: int) -> None:
        """Note that the buffer holds some rows, of as many as it can hold."""
        here = self.now()
        if self._filled is not None and held > self._filled[1]:
            self._seconds += here - self._filled[0]
            self._rows += held - self._filled[1]
            self.seconds_per_row = self._seconds / self._rows
        self._filled = None if held >= size else (here, held)
        self._size, self._held = size, held

    def paused(self, seconds: float) -> None:
        """Note how long the steps stood still for a measurement."""
        self.seconds_per_pause = seconds

    def step_begins(self) -> None:
        """Note that a step begins, with its batch at hand."""
        self._began, self._filled = self.now(), None

    def step_ends(self, rows: int) -> None:
        """Note that a step has ended, for which some rows were taken out of the buffer."""
        self._held = max(self._held - rows, 0)
        if self._began is not None:
            took = self.now() - self._began
            before = took if self.seconds_per_step is None else self.seconds_per_step
            self.seconds_per_step = before + SMOOTHING * (took - before)

    def left(self, steps: int, rows: int, pauses: int = 0) -> float | None:
        """Return the seconds until the last step has ended; None before the first.

        Args:
            steps: that are left.
            rows: activations per step.
            pauses: measurements that are left.
        """
        if self.seconds_per_step is None:
            return None
        half = max(self._size // 2, 1)
        missing = max(steps * rows - self._held, 0)
        read = -(-missing // half) * half if self._size else 0
        return steps * self.seconds_per_step + read * self.seconds_per_row + pauses * self.seconds_per_pause
