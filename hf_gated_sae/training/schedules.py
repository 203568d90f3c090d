"""How coefficients move over the steps of a run; the learning rate's own schedule is transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass


def linear_warmup(step: int, steps: int) -> float:
    """Return the share of its final value that a coefficient has at a step.

    Args:
        step: number of steps done.
        steps: length of the warm-up; 0 for none.

    >>> linear_warmup(0, 4), linear_warmup(9, 4)
    (0.25, 1.0)
    """
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


@dataclass
class LearningRateDip:
    """Lowers the learning rate where training was disturbed and lets it return along a cosine.

    Fresh Adam moments make first steps of up to ``1 / sqrt(1 - beta2)`` times the learning rate; the dip keeps
    resampled latents from being thrown away by them.

    Attributes:
        low: factor right after the disturbance.
        steps: steps until the factor is 1 again.
        since: step of the latest disturbance, None before the first.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """

    low: float = 0.1
    steps: int = 1000
    since: int | None = None

    def start(self, step: int) -> None:
        """Begin a dip.

        Args:
            step: the step that will be taken next.
        """
        self.since = step

    def factor(self, step: int) -> float:
        """Return what to multiply the learning rate of a step by."""
        if self.since is None or not 0 <= step - self.since < self.steps:
            return 1.0
        done = (step - self.since) / self.steps
        return self.low + (1 - self.low) * 0.5 * (1 - math.cos(math.pi * done))
