"""Activations in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import InputError, ShapeError
from ..take_rows import take_rows
from .base import ANY_SITE
from .rows import RowActivations


class TensorActivations(RowActivations):
    """Activations in memory; every epoch is a new permutation of all of them.

    An incomplete last batch of an epoch is dropped. Several processes split every batch between them: batch `i` of all
    their shards together is batch `i` of one process with a `world_size` times larger batch.

    Args:
        activations: ``[n, d]``, of any floating dtype, which fit any SAE; or a mapping by site, with the same token in
            row `i` of every site. Half precision halves the memory and is converted per batch.
        seed: of the permutations.

    Raises:
        ShapeError: if they are not floats ``[n, d]``, or not the same number for each site.
    """

    def __init__(self, activations: Tensor | Mapping[str, Tensor], *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        given = {ANY_SITE: activations} if isinstance(activations, Tensor) else dict(activations)
        if not given:
            raise InputError("Given no activations; expected a tensor [n, d], or one for each site.")
        for site, x in given.items():
            if x.ndim != 2 or not x.is_floating_point():
                at = f" at {site}" if site else ""
                raise ShapeError(f"Given activations {list(x.shape)} of {x.dtype}{at}; expected floats [n, d_in].")
        if len({len(x) for x in given.values()}) > 1:
            counts = ", ".join(f"{len(x)} at {site}" for site, x in given.items())
            raise ShapeError(f"Given activations {counts}; expected the same number at each site.")
        self.activations = given
        self.sites = tuple(given)

    def __len__(self) -> int:
        """Number of activations of each site."""
        return len(self.activations[self.sites[0]])

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Return some rows, site -> ``[n, d]``."""
        return {site: take_rows(x, rows) for site, x in self.activations.items()}
