"""Which latents have stopped firing."""

from __future__ import annotations

import torch
from torch import Tensor


class DeadLatents:
    """Counts, for every latent, the activations seen since it last fired.

    Args:
        d_sae: number of latents.
        dead_after: a latent that was silent for this many activations is dead.
        device: of the counters.
    """

    def __init__(self, d_sae: int, dead_after: int, device: torch.device | None = None) -> None:
        self.dead_after = dead_after
        self.silent_for = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired: Tensor, activations: int) -> None:
        """Count a batch.

        Args:
            fired: which latents were on for some activation of it, ``[d_sae]`` bool.
            activations: how many there were.
        """
        self.silent_for += activations
        self.silent_for.masked_fill_(fired, 0)

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
