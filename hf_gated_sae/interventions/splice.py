"""Replace the activation by the SAE's reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, LatentIndexError
from ..functional.tensor_checks import only_values
from ..modeling import SAEModel
from .base import Replacement, Targeted, require_sae
from .model_call import SiteCall
from .positions import shorten


@dataclass(frozen=True, eq=False)
class Splice(Targeted, Replacement):
    """Replace the activation by ``sae.decode(sae.encode(x))``; the SAE's error is lost.

    With ``error=True`` the error is added as a constant: ``reconstruction + (x - reconstruction).detach()``. The value
    is then `x`, bit for bit, and nothing is computed unless a derivative is needed. Derivatives, also those of
    `torch.func`, flow through the reconstruction and its latents only.

    Edits of latents attached at the same site act on the reconstruction, or on that sum. In both cases the site's
    gradient flows through one SAE, so two splices at one site are refused.

    Attributes:
        sae: the SAE; its configuration names the site.
        error: whether the SAE's error is added.
    """

    sae: SAEModel
    error: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_sae(self, self.sae)
        if not isinstance(self.error, bool):
            raise InputError(f"Splice was given error={shorten(self.error)}; expected True or False.")
        config = self.sae.config
        if config.kept_latents is not None:
            raise LatentIndexError(
                f"Splice was given an SAE with {config.rows} of {config.d_sae} latents loaded; a reconstruction needs "
                "all of them: load the SAE without latents=."
            )

    @property
    def aim(self) -> SAEModel:
        """The SAE."""
        return self.sae

    def replacement(self, run: SiteCall) -> Tensor | None:
        """Return the reconstruction ``[B, S, d]``, with the error if `error`; None changes nothing."""
        if not self.error:
            return run.reconstruction(self.sae)
        if only_values(run.x, *self.sae.parameters()):
            return None
        with_error: Tensor = _ValueWithOtherGradient.apply(run.x, run.reconstruction(self.sae))
        return with_error


class _ValueWithOtherGradient(torch.autograd.Function):
    """The exact value of one tensor with the derivatives of another of the same shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        value, other = inputs
        ctx.dtypes = value.dtype, other.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor]:
        return None, gradients[0].to(ctx.dtypes[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[1].to(ctx.dtypes[0])
        return tangent
