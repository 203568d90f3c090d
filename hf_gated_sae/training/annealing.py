"""Annealing the power of the sparsity penalty during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .processes import Processes
from .recent_batches import RecentBatches

Penalty = Callable[[float, Tensor, Tensor], float]
"""Sparsity term without its coefficient, as a function of the power, ``x [n, d_in]`` and ``target [n, d_out]``."""


class PowerAnnealing:
    """Lowers the power p of the penalty ``sum |latents|^p`` from 1 to `end` in equal changes between two steps.

    A smaller power penalises small latents more. At each change the coefficient is therefore multiplied by the ratio
    of the last batches' penalty under the old power to that under the new one, which keeps the total penalty.

    Args:
        end: final power, greater than 0; 1 for no annealing.
        first: step after which the power first changes.
        last: step after which it has its final value.
        changes: number of changes.
        batches: number of batches before each change from which the coefficient is rescaled.

    Attributes:
        power: current power.
        factor: multiplier of the coefficient.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), p-annealing.
    """

    def __init__(self, end: float, first: int, last: int, changes: int, batches: int) -> None:
        self.power = self.factor = 1.0
        self._batches = batches
        steps = [] if end == 1 else [first + (last - first) * k // max(1, changes - 1) for k in range(changes)]
        self._powers = {step: 1 + (end - 1) * (k + 1) / changes for k, step in enumerate(steps)}
        self._recent = RecentBatches()

    def observe(self, step: int, x: Tensor, target: Tensor) -> None:
        """Store a batch that is being trained on, if a change of the power is near.

        Args:
            step: number of steps done.
            x: activations ``[n, d_in]``.
            target: ``[n, d_out]``.
        """
        if any(step < change <= step + self._batches for change in self._powers):
            self._recent.observe(x, target)

    def advance(self, step: int, penalty: Penalty, processes: Processes) -> None:
        """Change the power if a change is scheduled for this step.

        Args:
            step: number of steps done, this one included.
            penalty: computes the penalty of a batch.
            processes: the processes that train on other batches.
        """
        power = self._powers.get(step)
        if power is None:
            return
        powers = {"old": self.power, "new": power}
        penalties = {name: sum(penalty(p, x, target) for x, target in self._recent) for name, p in powers.items()}
        old, new = processes.mean_by_name(penalties).values()
        self._recent.clear()
        if old > 0 and new > 0:  # without an active latent there is no penalty to keep
            self.factor *= old / new
        self.power = power

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume."""
        return {"power": self.power, "factor": self.factor, **self._recent.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a saved state, with the stored batches on a device."""
        self.power, self.factor = state["power"], state["factor"]
        self._recent.load_state_dict(state, device)
