"""What an SAE returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from .model import SAEModel


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
        latents: ``[..., d_sae]``.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    reconstruction: Tensor
    latents: Tensor

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], reconstruction: Tensor, latents: Tensor) -> TrainingLoss:
        """Sum the terms."""
        total = sum(terms.values(), start=reconstruction.new_zeros(()))
        return cls(total=total, terms=terms, reconstruction=reconstruction, latents=latents)


def reconstruction_loss(sae: SAEModel, x: Tensor) -> TrainingLoss:
    """Return ``|x - x^|^2`` alone: the objective of architectures that are sparse by construction.

    Args:
        sae: the SAE.
        x: activations ``[..., d_in]``.
    """
    latents = sae._encode(x, None)
    reconstruction = sae.decode(latents, x)
    terms = {"reconstruction": (x - reconstruction).square().sum(-1).mean()}
    return TrainingLoss.of(terms, reconstruction, latents)
