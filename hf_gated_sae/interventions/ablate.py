"""Switch latents off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError, unknown_name
from .base import LatentEdit, latent_list

MODES = ("zero", "mean")


@dataclass(frozen=True, eq=False)
class Ablate(LatentEdit):
    """Set latents to zero, or to their recorded mean.

    Attributes:
        latents: which latents.
        mode: ``"zero"`` or ``"mean"``; the mean is the SAE's recorded `mean_activation`.
    """

    latents: Sequence[int]
    mode: str = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "latents", latent_list(self, self.latents))
        super().__post_init__()
        if self.mode not in MODES:
            raise unknown_name("ablation mode", self.mode, MODES)
        if self.mode == "mean" and not self.sae.config.recorded_tokens:
            raise InputError(
                "Ablate(mode='mean') needs the latents' mean activations, and this SAE has none recorded: run "
                "hf_gated_sae.evaluate(model, sae, batches, record=True) on representative text, or use mode='zero'."
            )

    @property
    def indices(self) -> list[int]:
        """The latents to switch off."""
        return list(self.latents)

    def change(self, latents: Tensor) -> Tensor:
        """Return zeros or means, ``[B, S, n]``."""
        if self.mode == "zero":
            return latents.new_zeros(())
        mean = self.sae.mean_activation[self.sae.latent_indices(self.latents)]
        return mean.to(device=latents.device, dtype=latents.dtype).expand_as(latents)
