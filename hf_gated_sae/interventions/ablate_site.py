"""Replace the activation at a site by zeros or a constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..sites import Site
from .base import Replacement, Targeted
from .model_call import SiteCall
from .positions import shorten


@dataclass(frozen=True, eq=False)
class AblateSite(Targeted, Replacement):
    """Replace the activation by zeros, or by a constant vector such as its mean: ``x' = 0`` or ``x' = value``.

    Attributes:
        site: the site.
        value: the constant ``[d]``; zeros by default.
    """

    site: Site | str
    value: Tensor | None = None

    @property
    def aim(self) -> Site | str:
        """The site."""
        return self.site

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.value is not None and not (isinstance(self.value, Tensor) and torch.isfinite(self.value).all()):
            raise InputError(
                f"AblateSite was given the value {shorten(self.value)}; expected a tensor [d], or None for zeros."
            )
        if self.value is not None:
            object.__setattr__(self, "value", self.value.detach().clone())

    def require_width(self, width: int) -> None:
        """Raise unless the value is as wide as the site."""
        if self.value is not None and self.value.shape != (width,):
            raise ShapeError(
                f"AblateSite was given a value {list(self.value.shape)}, but {self.site} is {width} wide."
            )

    def replacement(self, run: SiteCall) -> Tensor:
        """Return the constant, ``[d]``."""
        return run.x.new_zeros(run.x.shape[-1]) if self.value is None else self.value.to(run.x)
