"""Limit latents from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._per_latent_values import LatentValueEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class Cap(LatentValueEdit):
    """Limit latents to at most given values: ``x + (min(latents, values) - latents) @ W_dec``.

    Attributes:
        values: the upper bound of each latent, at the scale of ``sae.encode``; or a list with one for each row of the
            batch.
    """

    values: Mapping[int, float | Sequence[float]]

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the latents, none above its bound, ``[B, S, n]``."""
        return torch.minimum(latents, self.numbers_like(latents, run))
