"""Remove directions from activations."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..modeling import SAEModel
from ..sites import Site
from ._checks import latent_list
from .base import Edit, Targeted, require_target
from .model_call import SiteCall
from .positions import shorten


@dataclass(frozen=True, eq=False)
class ProjectOut(Targeted, Edit):
    """Remove the activation's component along given directions; the SAE does not encode anything.

    ``x - Q Q^T x``, with `Q` an orthonormal basis of the directions.

    Attributes:
        site: a site; or an SAE, whose decoder directions are removed at the site that it writes.
        directions: one direction ``[d]`` or several ``[n, d]`` (linearly independent), of any norm; or latents of the
            SAE.
    """

    site: SAEModel | Site | str
    directions: Tensor | Sequence[int] | int
    _bases: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields and orthonormalise the directions."""
        super().__post_init__()
        if isinstance(self.site, SAEModel):
            require_target(self, self.site)
            object.__setattr__(self, "directions", latent_list(self, self.directions))
            object.__setattr__(self, "_bases", self._decoder_bases(self.site))
        else:
            rows = self._checked_directions()
            object.__setattr__(self, "directions", rows)
            object.__setattr__(self, "_bases", (_basis(rows),))

    def _checked_directions(self) -> Tensor:
        try:
            rows = torch.atleast_2d(torch.as_tensor(self.directions).detach().to("cpu", torch.float64, copy=True))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(
                f"ProjectOut was given {shorten(self.directions)}; expected a tensor of directions, [d] or [n, d]."
            ) from None
        if rows.ndim != 2 or not rows.numel() or not torch.isfinite(rows).all():
            raise InputError(
                f"ProjectOut was given directions {list(rows.shape)}; expected [d] or [n, d] with finite values."
            )
        return rows

    def _decoder_bases(self, sae: SAEModel) -> tuple[Tensor, ...]:
        """Return a basis of the latents' decoder directions at each output."""
        if not self.directions:
            raise InputError(f"ProjectOut was given no latents; pass at least one, 0 .. {sae.config.d_sae - 1}.")
        rows = sae.latent_indices(self.directions)  # type: ignore[arg-type]  # made a list of latents above
        sources = sae.sources_of(rows)
        bases = []
        for output in range(len(self.sites)):
            writing = [index for index, source in enumerate(sources) if source <= output or len(self.sites) == 1]
            written = sae.rows_at(rows[writing], output).detach().to("cpu", torch.float64)
            bases.append(_basis(written) if len(written) else written.new_zeros(0, sae.d_out))
        return tuple(bases)

    @property
    def aim(self) -> SAEModel | Site | str:
        """The SAE or the site."""
        return self.site

    @property
    def sae_used(self) -> None:
        """None: no SAE encodes."""

    @property
    def reads(self) -> tuple[Site, ...]:
        """No sites are read."""
        return ()

    @property
    def latents_needed(self) -> tuple[int, ...] | None:
        """The latents whose directions are removed; None with a site."""
        return None if isinstance(self.directions, Tensor) else tuple(self.directions)  # type: ignore[arg-type]  # a tuple

    def require_width(self, width: int) -> None:
        """Raise unless the directions are as wide as the site."""
        if self._bases[0].shape[1] != width:
            raise ShapeError(
                f"ProjectOut was given directions {self._bases[0].shape[1]} wide, but {self.first_site} is {width} "
                "wide."
            )

    def delta(self, run: SiteCall) -> Tensor:
        """Return minus the component along the directions, ``[B, S, d]``, computed in float32 or wider."""
        x = run.x.to(torch.promote_types(run.x.dtype, torch.float32))
        basis = _cached_basis(self, run.output, x)
        return -(x @ basis.T) @ basis


_BASES: WeakKeyDictionary[ProjectOut, dict[Hashable, Tensor]] = WeakKeyDictionary()


def _cached_basis(owner: ProjectOut, output: int, x: Tensor) -> Tensor:
    """Return a basis on a device and in a dtype; it is copied once, as copying would slow every decoding step."""
    key = (output, x.device, x.dtype)
    known = _BASES.setdefault(owner, {})
    if key not in known:
        with torch.inference_mode(False):  # an inference tensor could not be used later with gradients
            basis = owner._bases[output].to(x.device, x.dtype)
        if type(basis) is not Tensor:  # a traced model's fake tensor is not cached
            return basis
        known[key] = basis
    return known[key]


def _basis(rows: Tensor) -> Tensor:
    """Return orthonormal vectors ``[n, d]`` with the same span as `rows` (float64).

    Raises:
        InputError: if they are not linearly independent.
    """
    # Without normalisation the numerical rank would depend on the vectors' norms.
    rows = torch.nn.functional.normalize(rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-300), dim=-1)
    rank = int(torch.linalg.matrix_rank(rows))
    if rank < rows.shape[0]:
        raise InputError(
            f"ProjectOut was given {rows.shape[0]} directions that span only {rank} dimensions; expected "
            "directions that are not zero and linearly independent."
        )
    return torch.linalg.qr(rows.T).Q.T.contiguous()
