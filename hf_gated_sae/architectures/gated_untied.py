"""The Gated SAE whose two halves have separate encoders (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..functional.linear import linear
from ..functional.support import Support
from ..modeling import SAEConfig, SAEModel
from .gated import GatedSAE, GateObjective, converted, shared_settings


@dataclass(frozen=True)
class UntiedGatedObjective(GateObjective):
    """The objective of an `UntiedGatedSAE`: that of the Gated SAE, without a scale that ties its halves."""

    def _halves(self, sae: UntiedGatedSAE, x: Tensor) -> tuple[Support, Tensor, Tensor]:
        support = sae._support(x, -sae.b_gate)
        gate = support.projection + sae._take(sae.b_gate, support.latents)
        return support, gate, sae.magnitudes(support.project(sae.W_mag_T), support.latents) * (gate > 0)


@strict
class UntiedGatedSAEConfig(SAEConfig):
    """Configuration of an `UntiedGatedSAE`."""

    model_type = "gated_untied_sae"


class UntiedGatedSAE(SAEModel):
    """An SAE in which two encoders decide which latents are on, and how strongly.

    ``gate = (x - b_dec) @ W_enc + b_gate``; ``magnitude = relu((x - b_dec) @ W_mag + b_mag)``;
    ``latents = [gate > 0] * magnitude``.

    The paper found no gain over the tied `GatedSAE`, with 50 % more parameters.

    Attributes:
        W_mag_T: the magnitudes' encoder ``[d_sae, d_in]``.
        b_gate: gate bias ``[d_sae]``.
        b_mag: magnitude bias ``[d_sae]``.

    Source: arXiv 2404.16014, sections 3.2.1 and 5.1.
    """

    config: UntiedGatedSAEConfig
    config_class = UntiedGatedSAEConfig
    objective_class = UntiedGatedObjective
    encoder_names: ClassVar[tuple[str, ...]] = ("W_enc_T", "W_mag_T")

    def __init__(self, config: UntiedGatedSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.W_mag_T = nn.Parameter(torch.empty(config.rows, config.d_in))
        self.b_gate = nn.Parameter(torch.empty(config.rows))
        self.b_mag = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.copy_(self.W_mag_T, self.W_enc_T.detach())

    def magnitudes(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        """Return the values of the latents where their gates are open.

        Args:
            projection: ``(x - b_dec) @ W_mag``, ``[..., d_sae]``, or of the selected latents.
            latents: rows of the selected latents; None for all.
        """
        return torch.relu(projection + self._take(self.b_mag, latents))

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the smaller pre-activation of the two halves; see `SAEModel.margins`."""
        gate = self._project(x, latents) + self._take(self.b_gate, latents)
        magnitude = linear(self._centred(x), self._take(self.W_mag_T, latents)) + self._take(self.b_mag, latents)
        return torch.minimum(gate, magnitude)

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        gate = self._project(x, latents) + self._take(self.b_gate, latents)
        return self.magnitudes(linear(self._centred(x), self._take(self.W_mag_T, latents)), latents) * (gate > 0)

    @classmethod
    @torch.no_grad()
    def from_gated(cls, sae: GatedSAE) -> UntiedGatedSAE:
        """Return the untied SAE that computes the same function: ``W_mag = exp(r_mag) * W_enc``."""
        return converted(
            cls(UntiedGatedSAEConfig(**shared_settings(sae.config))),
            sae,
            W_enc_T=sae.W_enc_T,
            W_mag_T=sae.r_mag.exp()[:, None] * sae.W_enc_T,
            b_gate=sae.b_gate,
            b_mag=sae.b_mag,
        )
