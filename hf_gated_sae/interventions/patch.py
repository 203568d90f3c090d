"""Replace activations or latents by those of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..modeling import SAEModel
from ..sites import Site
from ._checks import latent_list, tensor_of
from .base import Conditional, Replacement, require_target
from .model_call import SiteCall
from .positions import shorten


@dataclass(frozen=True, eq=False)
class Patch(Conditional, Replacement):
    """Replace the activation, or some latents, by those of another run.

    At a site: ``x' = value``. With an SAE: ``x + (value - latents) @ W_dec``, so that the SAE's error and all other
    latents stay the same.

    Rows and columns correspond: the first column of `value` is for the first one of the batch, padding included, as
    `capture` returns it; later columns of the batch stay unchanged. The virtual tokens of PEFT's prompt tuning are not
    columns of the batch: remove those that `capture` returns before it.

    Attributes:
        target: a site, or an SAE.
        value: the activations ``[B, S, d]``; or values of the latents, ``[B, S, n]`` in the order of `latents` or
            ``[B, S, d_sae]``.
        latents: indices of latents of the SAE; all by default.
    """

    target: SAEModel | Site | str
    value: Tensor
    latents: Sequence[int] | None = field(default=None, kw_only=True)
    _values: Tensor = field(init=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        require_target(self, self.target)
        if self.latents is not None:
            object.__setattr__(self, "latents", latent_list(self, self.latents))
        # Padding may have any values; tokens that are patched with non-finite ones are refused during the call.
        value = tensor_of(self, self.value, "values [B, S, d] of another run", [3], finite=False)
        object.__setattr__(self, "value", value)
        super().__post_init__()
        object.__setattr__(self, "_values", value)
        if isinstance(self.target, SAEModel):
            d_sae = self.target.config.d_sae
            if value.shape[-1] not in (len(self.indices), d_sae):
                raise ShapeError(
                    f"Patch was given values {list(value.shape)} for {len(self.indices)} latents of {d_sae}; expected "
                    f"[B, S, {len(self.indices)}] or [B, S, {d_sae}]."
                )
            if value.shape[-1] == d_sae:
                object.__setattr__(self, "_values", value[..., self.indices])
        elif self.latents is not None:
            raise InputError(
                f"Patch was given latents={shorten(self.latents)} and a site; expected an SAE as target with latents=."
            )

    @property
    def aim(self) -> SAEModel | Site | str:
        """The SAE or the site."""
        return self.target

    @property
    def replaces(self) -> bool:
        """Whether the target is a site, whose activation is replaced; latents are changed by adding a difference."""
        return self.sae_used is None

    @property
    def columns(self) -> int:
        """Number of columns of the batch that are needed, at least those of `value`."""
        return max(super().columns, self.value.shape[1])

    @property
    def indices(self) -> list[int]:
        """The latents to change; none if the target is a site."""
        if self.sae_used is None:
            return []
        return list(range(self.sae_used.config.d_sae) if self.latents is None else self.latents)

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The latents in `latents`; None for all."""
        return None if self.latents is None else super().latents_needed

    def require_width(self, width: int) -> None:
        """Raise unless the SAE, or the activations, are as wide as the site."""
        super().require_width(width)
        if self.replaces and self.value.shape[-1] != width:
            raise ShapeError(
                f"Patch was given activations {list(self.value.shape)}, but {self.first_site} is {width} wide."
            )

    def mask(self, run: SiteCall) -> Tensor | bool:
        """Return which tokens to act on; columns after those of `value` are excluded."""
        mask, tokens, covered = super().mask(run), run.tokens, self.value.shape[1]
        here = tokens.batch_columns
        if mask is False or here.start >= covered:
            return False
        if here.start >= 0 and here.stop <= covered:
            return mask
        column = torch.arange(here.start, here.stop, device=tokens.index.device)
        within = (column >= 0) & (column < covered)
        return within.expand(tokens.shape) if mask is True else mask & within.to(torch.as_tensor(mask).device)

    def replacement(self, run: SiteCall) -> Tensor:
        """Return the other run's activations, ``[B, S, d]``."""
        return self._values_here(run).to(run.x.device)

    def delta(self, run: SiteCall) -> Tensor:
        """Return the change of the activation by the other run's latents, ``[B, S, d]``."""
        assert self.sae_used is not None  # with a site, `replacement` is called instead
        latents = run.latents(self.sae_used, self.indices)
        return run.written(self.sae_used, self.indices, self._values_here(run).to(latents) - latents)

    def _values_here(self, run: SiteCall) -> Tensor:
        return run.tokens.columns_of(self._values, "The value given to Patch")
