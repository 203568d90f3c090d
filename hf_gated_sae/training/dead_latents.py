"""Which latents have stopped firing."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class DeadLatents:
    """Counts, for every latent, the activations seen since it last fired.

    Which latents are dead changes between steps only: whatever the parts of a batch are, and whoever computes them,
    all of them see the same dead latents.

    Args:
        d_sae: number of latents.
        dead_after: a latent that was silent for this many activations is dead.
        device: of the counters.
        processes: those that see other activations; a latent is alive if it fires in one of them.

    Attributes:
        fired: which latents were on since the last step, in this process, ``[d_sae]`` bool; None before any batch.
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
        """Forget what was seen since the last step, which will not be taken."""
        self.fired: Tensor | None = None
        self._seen = 0

    @torch.no_grad()
    def update(self, fired: Tensor, activations: int) -> None:
        """See a batch, or a part of it.

        Args:
            fired: which latents were on for some activation of it, ``[d_sae]`` bool.
            activations: how many there were, in this process and as many in each of the others.
        """
        self.fired = fired if self.fired is None else self.fired | fired
        self._seen += activations * self._processes.count

    @torch.no_grad()
    def advance(self, fired: Tensor | None = None) -> None:
        """Count, at every step, what was seen since the last one.

        Args:
            fired: which latents were on in some process, ``[d_sae]`` bool; by default, in this one.
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

    def forgive(self, indices: Tensor) -> None:
        """Start counting anew for some latents ``[n]``."""
        self.silent_for[indices] = 0
