"""Ablate a whole site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from ..sites import Site
from .base import Replacement, SiteRun


@dataclass(frozen=True, eq=False)
class AblateSite(Replacement):
    """Replace the activation by zeros, or by a constant vector such as its mean.

    Attributes:
        site: where.
        value: what to put there, ``[d]``; zeros by default.
    """

    site: Site | str
    value: Tensor | None = None

    @property
    def place(self) -> Site:
        """The site."""
        return Site.parse(self.site)

    def replacement(self, run: SiteRun) -> Tensor:
        """Return the constant, ``[d]``."""
        if self.value is None:
            return torch.zeros_like(run.x[..., 0, :]).unsqueeze(-2)
        if self.value.shape != run.x.shape[-1:]:
            raise ShapeError(
                f"AblateSite at {self.site} was given a value {list(self.value.shape)}; expected [{run.x.shape[-1]}]."
            )
        return self.value.to(run.x)
