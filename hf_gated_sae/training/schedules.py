"""Schedules of coefficients over the steps of a run; the learning-rate schedule itself is transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass


def linear_warmup(step: int, steps: int) -> float:
    """Return the factor of a coefficient at a step of a linear warm-up.

    Args:
        step: number of steps done.
        steps: length of the warm-up; 0 for none.

    >>> linear_warmup(0, 4), linear_warmup(9, 4)
    (0.25, 1.0)
    """
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


@dataclass
class LearningRateDip:
    """Lowers the learning rate after a resampling and raises it back along a cosine.

    With reset Adam moments the first steps are up to ``1 / sqrt(1 - beta2)`` times the learning rate, which would undo
    the resampling.

    Attributes:
        low: factor right after the resampling.
        steps: steps until the factor is 1 again.
        since: step of the latest resampling, None before the first.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """

    low: float = 0.1
    steps: int = 1000
    since: int | None = None

    def start(self, step: int) -> None:
        """Begin a dip.

        Args:
            step: index of the next step.
        """
        self.since = step

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate at a step."""
        if self.since is None or not 0 <= step - self.since < self.steps:
            return 1.0
        done = (step - self.since) / self.steps
        return self.low + (1 - self.low) * 0.5 * (1 - math.cos(math.pi * done))
