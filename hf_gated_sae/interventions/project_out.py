"""Remove directions from activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..sites import Site
from .base import Edit, SiteRun
from .positions import shorten


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
    _basis: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields and orthonormalise the directions."""
        super().__post_init__()
        try:
            rows = torch.atleast_2d(torch.as_tensor(self.directions).detach().to("cpu", torch.float64))
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"ProjectOut was given {shorten(self.directions)}; expected a tensor of directions, [d] or [n, d]."
            ) from None
        if rows.ndim != 2 or not rows.numel() or not torch.isfinite(rows).all():
            raise InputError(
                f"ProjectOut was given directions {list(rows.shape)}; expected [d] or [n, d] with finite values."
            )
        # Only the directions' directions count: without this the rank would depend on their lengths.
        rows = torch.nn.functional.normalize(rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-300), dim=-1)
        rank = int(torch.linalg.matrix_rank(rows))
        if rank < rows.shape[0]:
            raise InputError(
                f"ProjectOut was given {rows.shape[0]} directions that span only {rank} dimensions; expected "
                "directions that are not zero and linearly independent."
            )
        object.__setattr__(self, "_basis", torch.linalg.qr(rows.T).Q.T.contiguous())

    @property
    def place(self) -> Site:
        """The site."""
        return Site.parse(self.site)

    def require_width(self, width: int) -> None:
        """Raise unless the directions are as wide as the site."""
        if self._basis.shape[1] != width:
            raise ShapeError(
                f"ProjectOut was given directions {self._basis.shape[1]} wide, but {self.site} is {width} wide."
            )

    def delta(self, run: SiteRun) -> Tensor:
        """Return minus the component along the directions, ``[B, S, d]``, computed in float32 or wider."""
        x = run.x.to(torch.promote_types(run.x.dtype, torch.float32))
        basis = self._basis.to(x)
        return -(x @ basis.T) @ basis
