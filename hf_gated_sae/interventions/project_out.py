"""Remove directions from activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..sites import Site
from .base import Edit, SiteRun


@dataclass(frozen=True, eq=False)
class ProjectOut(Edit):
    """Remove what the activation has along given directions; no SAE is needed.

    ``x - Q Q^T x``, with `Q` an orthonormal basis of the directions.

    Attributes:
        site: where.
        directions: one direction ``[d]`` or several ``[n, d]`` (linearly independent), of any length.
    """

    site: Site | str
    directions: Tensor

    def __post_init__(self) -> None:
        """Check the fields and orthonormalise the directions."""
        super().__post_init__()
        rows = torch.atleast_2d(torch.as_tensor(self.directions)).double()
        if rows.ndim != 2 or not rows.numel() or not torch.isfinite(rows).all():
            raise InputError(
                f"ProjectOut was given directions {list(rows.shape)}; expected [d] or [n, d] with finite values."
            )
        rank = int(torch.linalg.matrix_rank(rows))
        if rank < rows.shape[0]:
            raise InputError(
                f"ProjectOut was given {rows.shape[0]} directions that span only {rank} dimensions; expected directions "
                "that are not zero and linearly independent."
            )
        object.__setattr__(self, "_basis", torch.linalg.qr(rows.T).Q.T.contiguous())

    @property
    def place(self) -> Site:
        """The site."""
        return Site.parse(self.site)

    def delta(self, run: SiteRun) -> Tensor:
        """Return minus the component along the directions, ``[B, S, d]``, computed in float32 or wider."""
        basis: Tensor = self._basis  # type: ignore[attr-defined]  # set in __post_init__ of a frozen dataclass
        if basis.shape[1] != run.x.shape[-1]:
            raise ShapeError(
                f"ProjectOut at {self.site} was given directions {basis.shape[1]} wide; expected {run.x.shape[-1]}."
            )
        x = run.x.to(torch.promote_types(run.x.dtype, torch.float32))
        basis = basis.to(x)
        return -(x @ basis.T) @ basis
