"""Limit latents from below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._per_latent_values import LatentValueEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class Floor(LatentValueEdit):
    """Limit latents to at least given values: ``x + (max(latents, values) - latents) @ W_dec``.

    Attributes:
        values: the lower bound of each latent, at the scale of ``sae.encode``; or a list with one for each row of the
            batch.
    """

    values: Mapping[int, float | Sequence[float]]

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the latents, none below its bound, ``[B, S, n]``."""
        return torch.maximum(latents, self.numbers_like(latents, run))
