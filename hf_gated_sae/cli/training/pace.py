"""Estimating the remaining time of a run, from the separate speeds of its steps and of reading between them."""

from __future__ import annotations

import time
from collections.abc import Callable

SMOOTHING = 0.05
"""Weight of the latest step in the moving average: steps become faster as fewer latents are active."""


class Pace:
    """Estimates the remaining time of the steps of a run.

    Activations come from a buffer, which is refilled whenever it is half empty: some steps wait for that, most do not,
    and the first ones never do. Steps and reading are therefore timed separately.

    Args:
        now: returns the time in seconds.

    Attributes:
        seconds_per_step: of the steps without reading.
        seconds_per_row: to read one activation into the buffer.
        seconds_per_pause: of an evaluation.
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
        """Record that the buffer holds `held` of its `size` rows."""
        now = self.now()
        if self._filled is not None and held > self._filled[1]:
            self._seconds += now - self._filled[0]
            self._rows += held - self._filled[1]
            self.seconds_per_row = self._seconds / self._rows
        self._filled = None if held >= size else (now, held)
        self._size, self._held = size, held

    def paused(self, seconds: float) -> None:
        """Record the duration of an evaluation between steps."""
        self.seconds_per_pause = seconds

    def step_begins(self) -> None:
        """Record the start of a step, after its batch was read."""
        self._began, self._filled = self.now(), None

    def step_ends(self, rows: int) -> None:
        """Record the end of a step that took `rows` rows from the buffer."""
        self._held = max(self._held - rows, 0)
        if self._began is not None:
            took = self.now() - self._began
            before = took if self.seconds_per_step is None else self.seconds_per_step
            self.seconds_per_step = before + SMOOTHING * (took - before)

    def left(self, steps: int, rows: int, pauses: int = 0) -> float | None:
        """Return the seconds until the last step has ended; None before the first.

        Args:
            steps: number of remaining steps.
            rows: activations per step.
            pauses: number of remaining evaluations.
        """
        if self.seconds_per_step is None:
            return None
        half = max(self._size // 2, 1)
        missing = max(steps * rows - self._held, 0)
        read = -(-missing // half) * half if self._size else 0
        return steps * self.seconds_per_step + read * self.seconds_per_row + pauses * self.seconds_per_pause
