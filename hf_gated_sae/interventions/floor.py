"""Hold latents at least at a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._per_latent_values import LatentValueEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class Floor(LatentValueEdit):
    """Hold latents at least at given values: ``x + (m(latents, values) - latents) @ W_dec``, with `m` the maximum.

    Attributes:
        values: the bound of each latent, in the units of ``sae.encode``; or a list with
            one for each row of the batch.
    """

    values: Mapping[int, float | Sequence[float]]

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the latents, none of them beyond its bound, ``[B, S, n]``."""
        return torch.maximum(latents, self.numbers_like(latents, run))
