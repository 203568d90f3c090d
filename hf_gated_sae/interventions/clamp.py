"""Hold latents at a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .arguments import latent_values
from .base import LatentEdit
from .run import SiteRun


@dataclass(frozen=True, eq=False)
class Clamp(LatentEdit):
    """Set latents to given values, whatever they were: ``x + (values - latents) @ W_dec``.

    Attributes:
        values: new value of each latent, in the units of ``sae.encode``.
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
        """Return the given values, ``[n]``."""
        return latents.new_tensor(list(self.values.values()))
