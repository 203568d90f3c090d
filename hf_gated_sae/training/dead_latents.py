"""Counting for how long each latent has not fired, and which latents are dead."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class DeadLatents:
    """Counts, for every latent, the activations seen since it last fired.

    The set of dead latents changes between steps only, so all parts of a batch, in all processes, see the same one.

    Args:
        d_sae: number of latents.
        dead_after: a latent that has not fired for this many activations is dead.
        device: of the counters.
        processes: the processes that see other activations; a latent is alive if it fires in any of them.

    Attributes:
        fired: which latents fired since the last step, in this process, ``[d_sae]`` bool; None before any batch.
    """

    def __init__(
        self,
        d_sae: int,
        dead_after: int,
        device: torch.device | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.dead_after = dead_after
        self.reset()
        self._processes = processes or Processes()
        self.silent_for = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Discard the counts since the last step, for a step that is not taken."""
        self.fired: Tensor | None = None
        self._seen = 0

    @torch.no_grad()
    def update(self, fired: Tensor, activations: int) -> None:
        """Add a batch, or a part of one.

        Args:
            fired: which latents fired on any of its activations, ``[d_sae]`` bool.
            activations: number of activations in this process; the others have the same number.
        """
        self.fired = fired if self.fired is None else self.fired | fired
        self._seen += activations * self._processes.count

    @torch.no_grad()
    def advance(self, fired: Tensor | None = None) -> None:
        """Update the counters at the end of a step.

        Args:
            fired: which latents fired in any process, ``[d_sae]`` bool; by default, in this one.
        """
        fired = self.fired if fired is None else fired
        self.silent_for += self._seen
        if fired is not None:
            self.silent_for.masked_fill_(fired.to(self.silent_for.device), 0)
        self.reset()

    @property
    def mask(self) -> Tensor:
        """Which latents are dead, ``[d_sae]`` bool."""
        return self.silent_for >= self.dead_after

    @property
    def indices(self) -> Tensor:
        """The dead latents ``[n]``, in order."""
        return self.mask.nonzero().squeeze(-1)

    def reset_counters(self, indices: Tensor) -> None:
        """Set the counters of some latents ``[n]`` to 0."""
        self.silent_for[indices] = 0
