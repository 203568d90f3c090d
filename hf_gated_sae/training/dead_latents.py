"""Which latents have stopped firing."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class DeadLatents:
    """Counts, for every latent, the activations seen since it last fired.

    Args:
        d_sae: number of latents.
        dead_after: a latent that was silent for this many activations is dead.
        device: of the counters.
        processes: those that see other activations; a latent is alive if it fires in one of them.

    Attributes:
        fired: which latents were on since processes last agreed, ``[d_sae]`` bool; None in a process that is alone.
    """

    def __init__(
        self,
        d_sae: int,
        dead_after: int,
        device: torch.device | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.dead_after = dead_after
        self.fired: Tensor | None = None
        self._processes = processes or Processes()
        self.silent_for = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired: Tensor, activations: int) -> None:
        """Count a batch.

        Args:
            fired: which latents were on for some activation of it, ``[d_sae]`` bool.
            activations: how many there were, in this process and as many in each of the others.
        """
        self.silent_for += activations * self._processes.count
        self.silent_for.masked_fill_(fired, 0)
        if not self._processes.alone:
            self.fired = fired if self.fired is None else self.fired | fired

    @torch.no_grad()
    def agree(self, fired: Tensor) -> None:
        """Take in, at every step, what all processes have seen since the last one.

        Args:
            fired: which latents were on in some process, ``[d_sae]`` bool.
        """
        self.silent_for.masked_fill_(fired, 0)
        self.fired = None

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
