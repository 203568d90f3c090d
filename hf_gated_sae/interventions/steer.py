"""Push activations along a latent's decoder direction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError, unknown_name
from .base import LatentEdit, SiteRun, check_numbers

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
        super().__post_init__()
        check_numbers(self, {self.latent: self.strength})
        if self.unit not in UNITS:
            raise unknown_name("steering unit", self.unit, UNITS)
        if self.unit == "max" and not self.sae.max_activation[self.latent] > 0:
            why = "it never fired on the recorded text" if self.sae.config.recorded_tokens else "nothing was recorded"
            raise InputError(
                f"Steer measures strength in units of the latent's maximum activation, and latent {self.latent} has none "
                f"({why}): run hf_gated_sae.evaluate(model, sae, batches, record=True), or pass unit='raw'."
            )

    @property
    def indices(self) -> list[int]:
        """The latent."""
        return [int(self.latent)]

    def change(self, latents: Tensor) -> Tensor:
        """Return the latent plus what is added to it."""
        return latents + self._added

    @property
    def _added(self) -> float:
        return self.strength * (float(self.sae.max_activation[self.latent]) if self.unit == "max" else 1.0)

    def delta(self, run: SiteRun) -> Tensor:
        """Return the direction times the strength, ``[d]``: the same at every token."""
        return self._added * run.sae(self.sae).W_dec[self.latent]
