"""Multiply latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._per_latent_values import LatentValueEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class Scale(LatentValueEdit):
    """Multiply latents by given factors: ``x + (factors - 1) * latents @ W_dec``; inactive latents stay inactive.

    Attributes:
        factors: factor of each latent; 1 changes nothing, 0 ablates; or a list with one for each row of the batch.
    """

    numbers_field: ClassVar[str] = "factors"

    factors: Mapping[int, float | Sequence[float]]

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the products, ``[B, S, n]``."""
        return latents * self.numbers_like(latents, run)
