"""What an SAE returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..functional.short_repr import short_repr
from ..functional.sparse_latents import SparseLatents


@dataclass
class SAEOutput(ModelOutput):
    """Result of ``sae(x)``.

    Attributes:
        reconstruction: ``[..., d_out]``.
        latents: ``[..., d_sae]``.
    """

    reconstruction: Tensor | None = None
    latents: Tensor | None = None


@dataclass(frozen=True)
class TrainingLoss:
    """A training objective, term by term.

    Every term is a mean over tokens; squared errors are summed, not averaged, over the width.

    Attributes:
        total: the scalar to minimise, the sum of the terms.
        terms: weighted scalar terms by name, such as ``{"reconstruction": ..., "sparsity": ..., "auxiliary": ...}``.
        reconstruction: ``[..., d_out]``.
        latents: ``[..., d_sae]``, or those that are on where the others were never computed; without gradients.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    reconstruction: Tensor
    latents: Tensor | SparseLatents

    __repr__ = short_repr

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], reconstruction: Tensor, latents: Tensor | SparseLatents) -> TrainingLoss:
        """Sum the terms."""
        total = sum(terms.values(), start=reconstruction.new_zeros(()))
        return cls(total=total, terms=terms, reconstruction=reconstruction, latents=latents)

    @property
    def fired(self) -> Tensor:
        """Which latents are on for some token, ``[d_sae]`` bool."""
        if isinstance(self.latents, SparseLatents):
            return torch.bincount(self.latents.indices, minlength=self.latents.d_sae) > 0
        return (self.latents != 0).reshape(-1, self.latents.shape[-1]).any(0)

    @property
    def l0(self) -> Tensor:
        """Mean number of latents that are on per token, ``[]``."""
        if isinstance(self.latents, SparseLatents):
            return self.latents.l0.float().mean()
        return (self.latents != 0).sum(-1).float().mean()
