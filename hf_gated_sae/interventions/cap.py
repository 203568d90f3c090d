"""Hold latents at most at a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import latent_values
from .base import LatentEdit
from .run import SiteRun


@dataclass(frozen=True, eq=False)
class Cap(LatentEdit):
    """Hold latents at most at given values: ``x + (m(latents, values) - latents) @ W_dec``, with `m` the minimum.

    Attributes:
        values: the bound of each latent, in the units of ``sae.encode``.
    """

    values: Mapping[int, float]

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "values", latent_values(self, self.values))
        super().__post_init__()

    @property
    def indices(self) -> list[int]:
        """The latents to hold."""
        return list(self.values)

    def change(self, latents: Tensor, run: SiteRun) -> Tensor:
        """Return the latents, none of them beyond its bound, ``[B, S, n]``."""
        return torch.minimum(latents, latents.new_tensor(list(self.values.values())))
