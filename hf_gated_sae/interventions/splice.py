"""Put the SAE's reconstruction in the activation's place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import LatentIndexError
from ..modeling import SAEModel
from ..sites import Site
from .base import Replacement, SiteRun, require_sae, site_of


@dataclass(frozen=True, eq=False)
class Splice(Replacement):
    """Replace the activation by ``sae.decode(sae.encode(x))``; what the SAE cannot explain is lost.

    Edits of latents attached at the same site act on the reconstruction.

    Attributes:
        sae: the SAE; its configuration names the site.
    """

    sae: SAEModel

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_sae(self, self.sae)
        config = self.sae.config
        if config.kept_latents is not None:
            raise LatentIndexError(
                f"Splice was given an SAE of which {config.rows} of {config.d_sae} latents were loaded, which do not "
                "make up a reconstruction: load the SAE without latents=."
            )

    @property
    def place(self) -> Site:
        """The SAE's site."""
        return site_of(self.sae)

    @property
    def sae_used(self) -> SAEModel:
        """The SAE."""
        return self.sae

    def replacement(self, run: SiteRun) -> Tensor:
        """Return the reconstruction, ``[B, S, d]``."""
        sae = run.sae(self.sae)
        return sae.decode(run.all_latents(self.sae), run.x.to(sae.dtype))
