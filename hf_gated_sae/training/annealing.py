"""Lowering the power of the sparsity penalty while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .processes import Processes
from .recent_batches import RecentBatches

Penalty = Callable[[float, Tensor, Tensor], float]
"""Returns the sparsity term without its coefficient, of a power, ``x [n, d_in]`` and ``target [n, d_out]``."""


class PowerAnnealing:
    """Moves the power p of the penalty ``sum |latents|^p`` from 1 to its end in equal changes between two steps.

    A smaller power makes small latents dearer, so that at each change the coefficient is multiplied by what the last
    batches cost under the old power over what they cost under the new one, and the pressure as a whole stays.

    Args:
        end: last power, greater than 0; 1 changes nothing.
        first: step after which it changes for the first time.
        last: step after which it is at its end.
        changes: number of changes.
        batches: how many batches before a change are remembered for it.

    Attributes:
        power: the present power.
        factor: what the coefficient is to be multiplied by.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), p-annealing.
    """

    def __init__(self, end: float, first: int, last: int, changes: int, batches: int) -> None:
        self.power = self.factor = 1.0
        self._batches = batches
        steps = [] if end == 1 else [first + (last - first) * k // max(1, changes - 1) for k in range(changes)]
        self._powers = {step: 1 + (end - 1) * (k + 1) / changes for k, step in enumerate(steps)}
        self._recent = RecentBatches()

    def observe(self, step: int, x: Tensor, target: Tensor) -> None:
        """See a batch that is being trained on.

        Args:
            step: number of steps done.
            x: activations ``[n, d_in]``.
            target: ``[n, d_out]``.
        """
        if any(step < change <= step + self._batches for change in self._powers):
            self._recent.observe(x, target)

    def advance(self, step: int, penalty: Penalty, processes: Processes) -> None:
        """Change the power if this is a step to do so.

        Args:
            step: number of steps done, this one included.
            penalty: measures what a batch costs.
            processes: those that see other batches.
        """
        power = self._powers.get(step)
        if power is None:
            return
        powers = {"old": self.power, "new": power}
        costs = {name: sum(penalty(p, x, target) for x, target in self._recent) for name, p in powers.items()}
        old, new = processes.numbers(costs).values()
        self._recent.clear()
        if old > 0 and new > 0:  # with no latent on there is no pressure to keep
            self.factor *= old / new
        self.power = power

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"power": self.power, "factor": self.factor, **self._recent.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state, with what is remembered on a device."""
        self.power, self.factor = state["power"], state["factor"]
        self._recent.load_state_dict(state, device)
