"""Push activations along a latent's decoder direction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError, unknown_name
from ..modeling import SAEModel
from .base import LatentEdit, SiteRun, latent_list, latent_values
from .positions import shorten

UNITS = ("max", "raw")


@dataclass(frozen=True, eq=False)
class Steer(LatentEdit):
    """Add ``strength * unit * W_dec[latent]``; nothing is encoded.

    Attributes:
        latent: which latent.
        strength: how much to add, in units of `unit`; negative pushes away.
        unit: ``"max"``, the latent's recorded maximum activation, or ``"raw"``, 1.
    """

    latent: int
    strength: float = field(default=1.0, kw_only=True)
    unit: str = field(default="max", kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        found = latent_list(self, self.latent)
        if len(found) != 1:
            raise InputError(
                f"Steer was given {shorten(self.latent)}; expected one latent. Attach one Steer for each."
            )
        object.__setattr__(self, "latent", found[0])
        object.__setattr__(self, "strength", latent_values(self, {self.latent: self.strength})[self.latent])
        super().__post_init__()
        if self.unit not in UNITS:
            raise unknown_name("steering unit", self.unit, UNITS)
        if self.unit == "max" and not self._maximum(self.sae) > 0:
            why = "it never fired on the recorded text" if self.sae.config.recorded_tokens else "nothing was recorded"
            raise InputError(
                f"Steer measures strength in units of the latent's maximum activation, and latent {self.latent} has "
                f"none ({why}): run hf_gated_sae.evaluate(model, sae, batches, record=True), or pass unit='raw'."
            )

    @property
    def indices(self) -> list[int]:
        """The latent."""
        return [self.latent]

    def change(self, latents: Tensor) -> Tensor:
        """Return the latent plus what is added to it."""
        return latents + self._added(self.sae).to(latents)

    def _added(self, sae: SAEModel) -> Tensor:
        return self.strength * (self._maximum(sae) if self.unit == "max" else sae.max_activation.new_ones(()))

    def _maximum(self, sae: SAEModel) -> Tensor:
        """Return the latent's recorded maximum."""
        return sae.max_activation[sae.latent_indices([self.latent])[0]]

    def delta(self, run: SiteRun) -> Tensor:
        """Return the direction times the strength, ``[d]``; per token where the SAE normalises each token."""
        sae = run.sae(self.sae)
        return run.written(self.sae, self._added(sae) * sae.W_dec[sae.latent_indices([self.latent])[0]])
