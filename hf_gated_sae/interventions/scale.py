"""Multiply latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .arguments import latent_values
from .base import LatentEdit
from .run import SiteRun


@dataclass(frozen=True, eq=False)
class Scale(LatentEdit):
    """Multiply latents by given factors: ``x + (factors - 1) * latents @ W_dec``; a latent that is off stays off.

    Attributes:
        factors: factor of each latent; 1 changes nothing, 0 ablates.
    """

    factors: Mapping[int, float]

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "factors", latent_values(self, self.factors))
        super().__post_init__()

    @property
    def indices(self) -> list[int]:
        """The latents to multiply."""
        return list(self.factors)

    def change(self, latents: Tensor, run: SiteRun) -> Tensor:
        """Return the products, ``[B, S, n]``."""
        return latents * latents.new_tensor(list(self.factors.values()))
