"""What an architecture is trained to minimise; the fields of an objective select its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..functional.squared_error import squared_error
from ..functional.support import Support
from .output import TrainingLoss

if TYPE_CHECKING:
    from .model import SAEModel
    from .topk_base import TopKBaseSAE


@dataclass(frozen=True)
class Sparsity:
    """The weight and power of the sparsity penalty at one step of a run.

    Attributes:
        coefficient: lambda, in units of a squared error summed over the width.
        power: p of the penalty ``|latents|_p^p``; 1 but for annealed runs.
    """

    coefficient: float = 0.0
    power: float = 1.0

    def penalty(self, values: Tensor) -> Tensor:
        """Return ``values ** power`` of values that are not negative; the gradient at 0 is 0 for every power below 1.

        Args:
            values: any shape.
        """
        if self.power == 1.0:
            return values
        on = values > 0
        return torch.where(on, values, 1.0).pow(self.power) * on


@dataclass(frozen=True)
class Objective:
    """``|y - y^|^2``, the whole objective of architectures that are sparse by construction.

    An architecture with another objective defines a subclass beside it, and names it as its `objective_class`. Every
    term is a mean over tokens; squared errors are summed over the width.
    """

    anneals: ClassVar[bool] = False
    """Whether the objective uses the power of `Sparsity`."""

    penalises: ClassVar[bool] = False
    """Whether the objective uses the coefficient of `Sparsity`."""

    competes: ClassVar[bool] = False
    """Whether a latent above the point where it turns on may still be left out in favour of others."""

    def loss(self, sae: SAEModel, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations.

        Args:
            sae: the SAE.
            x: activations ``[..., d_in]``.
            target: what is to be written, ``[..., d_out]``: `x` itself unless the SAE is a transcoder.
            sparsity: weight and power of the penalty.
        """
        latents = sae.encode(x)
        reconstruction = sae.decode(latents, x)
        terms = {"reconstruction": squared_error(target, reconstruction)}
        return TrainingLoss.of(terms, reconstruction, latents.detach())

    def frozen(self, sae: SAEModel) -> frozenset[str]:
        """Return the names of the SAE's parameters that are not trained."""
        return frozenset()

    def constrain(self, sae: SAEModel) -> None:
        """Restore the constraints on parameters that the objective assumes; to be called after every step."""


@dataclass(frozen=True)
class TopKObjective(Objective):
    """``|y - y^|^2`` for architectures that select latents per token, and for nested parts of their dictionary.

    Attributes:
        prefixes: shares of the latents, each between 0 and 1. For each there is a further term, the squared error with
            only that share of the first latents, which makes a Matryoshka SAE.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2; Bussmann et al. 2025 (arXiv 2503.17547) for the prefixes.
    """

    competes: ClassVar[bool] = True

    prefixes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the shares."""
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if not all(0 < share < 1 for share in self.prefixes):
            raise InputError(f"prefixes is {list(self.prefixes)}; expected shares of the latents between 0 and 1.")

    def loss(self, sae: TopKBaseSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support, latents = sae.kept_support(x)
        return self._reconstruction(sae, x, target, support, latents)

    def _reconstruction(
        self, sae: SAEModel, x: Tensor, target: Tensor, support: Support, latents: Tensor
    ) -> TrainingLoss:
        """Return the objective's terms for kept latents, given as values of a support."""
        constant = sae.constant(x)
        reconstruction = support.decode(latents, sae.W_dec) + constant
        terms = {"reconstruction": squared_error(target, reconstruction)}
        d_sae = sae.config.d_sae
        widths = [max(1, round(share * d_sae)) for share in self.prefixes]
        if len({*widths, d_sae}) <= len(widths):
            raise InputError(
                f"Of {d_sae} latents the prefixes {list(self.prefixes)} select the first {widths}; expected different "
                "numbers, each less than all latents."
            )
        numbers = torch.arange(d_sae, device=x.device) if support.latents is None else support.latents
        for first in widths:
            part = support.decode(latents * (numbers < first), sae.W_dec) + constant
            terms[f"reconstruction_{first}"] = squared_error(target, part)
        return TrainingLoss.of(terms, reconstruction, support.code(latents))
