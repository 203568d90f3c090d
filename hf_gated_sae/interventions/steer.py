"""Steer activations along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ..errors import InputError, ShapeError, unknown_name
from ..modeling import SAEModel
from ..sites import Site
from ._checks import PerRow, latent_list, number_per_row, tensor_of
from .base import Conditional, require_target
from .model_call import SiteCall, rows_of
from .positions import shorten

UNITS = ("max", "raw", "norm")


@dataclass(frozen=True, eq=False)
class Steer(Conditional):
    """Add a latent's decoder direction, or a vector: ``x + strength * unit * direction``, without encoding.

    * ``"max"``: ``strength * max_activation[latent] * W_dec[latent]``.
    * ``"raw"``: ``strength * W_dec[latent]``, or ``strength * vector``.
    * ``"norm"``: ``strength * |x| * direction / |direction|``, with the norm of the activation at each token.

    Attributes:
        target: an SAE, or a site.
        direction: a latent of the SAE, or a vector ``[d]`` for a site.
        strength: multiple of `unit` to add; may be negative. A list has one for each row of the batch.
        unit: ``"max"``, ``"raw"`` or ``"norm"``. By default ``"max"`` for a latent and ``"raw"`` for a vector, which
            has no maximum.
    """

    target: SAEModel | Site | str
    direction: int | Tensor | Sequence[float]
    strength: float | Sequence[float] = field(default=1.0, kw_only=True)
    unit: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        require_target(self, self.target)
        if isinstance(self.target, SAEModel):
            self._check_latent(self.target)
        else:
            self._check_vector()
        super().__post_init__()
        if self.unit not in UNITS:
            raise unknown_name("steering unit", self.unit, UNITS)
        if isinstance(self.target, SAEModel) and self.unit == "max":
            self._check_maximum(self.target)

    def _check_latent(self, sae: SAEModel) -> None:
        if isinstance(self.direction, Tensor) and self.direction.ndim:
            raise InputError(
                f"Steer was given an SAE and a vector {list(self.direction.shape)}; expected one latent with an SAE, "
                f"or a site with a vector: Steer({sae.config.sites_written[0]!r}, vector)."
            )
        found = latent_list(self, self.direction)
        if len(found) != 1:
            raise InputError(
                f"Steer was given {shorten(self.direction)}; expected one latent. Attach one Steer for each."
            )
        object.__setattr__(self, "direction", found[0])
        strength = number_per_row(self, f"as strength for latent {found[0]}", self.strength)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "unit", self.unit or "max")

    def _check_vector(self) -> None:
        vector = tensor_of(self, self.direction, "a vector [d] with a site", [1])
        object.__setattr__(self, "direction", vector)
        object.__setattr__(self, "strength", number_per_row(self, "as strength", self.strength))
        object.__setattr__(self, "unit", self.unit or "raw")
        if self.unit == "max":
            raise InputError(
                "Steer was given a vector and unit='max', the recorded maximum of a latent, which a vector does not "
                "have: use 'raw' to add strength * vector, or 'norm' for a multiple of the activation's norm."
            )
        if self.unit == "norm" and not vector.any():
            raise InputError("Steer was given a vector of zeros, which has no direction.")

    def _check_maximum(self, sae: SAEModel) -> None:
        if not self._maximum(sae) > 0:
            why = "it never fired on the recorded text" if sae.config.recorded_tokens else "nothing was recorded"
            raise InputError(
                f"Steer measures strength in units of the latent's maximum activation, and latent {self.direction} "
                f"has none ({why}): run hf_gated_sae.evaluate(model, sae, batches, record=True), or pass unit='raw'."
            )

    @property
    def aim(self) -> SAEModel | Site | str:
        """The SAE or the site."""
        return self.target

    @property
    def indices(self) -> list[int]:
        """The latent; none if the target is a site."""
        return [self.direction] if isinstance(self.direction, int) else []

    def require_width(self, width: int) -> None:
        """Raise unless the SAE, or the vector, is as wide as the site."""
        super().require_width(width)
        if isinstance(self.direction, Tensor) and self.direction.shape != (width,):
            raise ShapeError(
                f"Steer was given a vector {list(self.direction.shape)}, but {self.first_site} is {width} wide."
            )

    def _maximum(self, sae: SAEModel) -> Tensor:
        """Return the latent's recorded maximum."""
        return sae.max_activation[rows_of(sae, self.indices)[0]]

    def delta(self, run: SiteCall) -> Tensor:
        """Return the vector to add, ``[d]``; per row or token if strength or unit differ between them."""
        strength = self._strength(run)
        if isinstance(self.target, SAEModel):
            sae = run.sae(self.target)
            units = self._maximum(sae) if self.unit == "max" else sae.max_activation.new_ones(())
            amount = units if self.unit == "norm" else strength * units
            added = run.written(self.target, self.indices, amount if amount.ndim else amount.reshape(1))
        else:
            assert isinstance(self.direction, Tensor)  # other types are refused on construction
            vector = self.direction.to(run.x.device, torch.promote_types(self.direction.dtype, run.x.dtype))
            added = vector if self.unit == "norm" else (strength * vector).to(vector.dtype)
        if self.unit != "norm":
            return added
        wide = torch.promote_types(run.x.dtype, torch.float32)
        length = run.x.to(wide).norm(dim=-1, keepdim=True)
        return strength * length * torch.nn.functional.normalize(added.to(wide), dim=-1)

    def _strength(self, run: SiteCall) -> float | Tensor:
        """Return the strength, or those of the rows, ``[B, 1, 1]`` in float32 or wider."""
        strength = cast("PerRow", self.strength)  # checked on construction
        if isinstance(strength, float):
            return strength
        by_row = torch.tensor(strength, dtype=torch.promote_types(run.x.dtype, torch.float32), device=run.x.device)
        return run.tokens.of_rows(by_row, "strength of Steer").to(run.x.device)[:, None, None]
