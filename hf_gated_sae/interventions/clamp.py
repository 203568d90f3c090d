"""Set latents to constant values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ._per_latent_values import LatentValueEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class Clamp(LatentValueEdit):
    """Set latents to given values: ``x + (values - latents) @ W_dec``.

    Attributes:
        values: new value of each latent, at the scale of ``sae.encode``; or a list with one for each row of the batch.
    """

    values: Mapping[int, float | Sequence[float]]

    def change(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the given values, ``[n]``, or ``[B, 1, n]`` if they differ between rows."""
        return self.numbers_like(latents, run)
