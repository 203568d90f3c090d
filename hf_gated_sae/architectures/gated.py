"""The Gated SAE of Rajamanoharan et al. 2024 (arXiv 2404.16014)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..functional.search import lowest_projection
from ..modeling import SAEConfig, SAEModel, TrainingLoss
from .jumprelu import JumpReLUSAE, JumpReLUSAEConfig

SAE = TypeVar("SAE", bound=SAEModel)


@strict
class GatedSAEConfig(SAEConfig):
    """Configuration of a `GatedSAE`."""

    model_type = "gated_sae"


class GatedSAE(SAEModel):
    r"""Which latents are on, and how strongly, are decided by two halves of one encoder.

    ``gate = (x - b_dec) @ W_enc + b_gate``;
    ``magnitude = relu(exp(r_mag) * ((x - b_dec) @ W_enc) + b_mag)``;
    ``latents = [gate > 0] * magnitude``.

    `W_enc` is the paper's ``W_gate``; ``W_mag = exp(r_mag) * W_gate`` is tied to it and never stored.

    Attributes:
        b_gate: gate bias ``[d_sae]``.
        b_mag: magnitude bias ``[d_sae]``.
        r_mag: log of the magnitude encoder's scale per latent ``[d_sae]``.

    Source: arXiv 2404.16014, sections 3.2.1 (encoder) and 3.2.2 (loss).
    """

    config: GatedSAEConfig
    config_class = GatedSAEConfig

    def __init__(self, config: GatedSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_gate = nn.Parameter(torch.empty(config.rows))
        self.b_mag = nn.Parameter(torch.empty(config.rows))
        self.r_mag = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _gate_and_latents(self, projection: Tensor, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gate's pre-activation and the latents; one matrix product serves both halves."""
        gate = projection + self._take(self.b_gate, latents)
        scale = self._take(self.r_mag, latents).exp()
        magnitude = torch.relu(projection * scale + self._take(self.b_mag, latents))
        return gate, magnitude * (gate > 0)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return self._gate_and_latents(projection, latents)[1]

    def _cut(self) -> Tensor:
        # Rounding moves the scaled projection by a share of itself, so that the magnitude's own cut needs a margin.
        magnitude = lowest_projection(torch.zeros_like(self.b_mag), self.b_mag / self.r_mag.exp())
        return torch.maximum(-self.b_gate, magnitude)

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float) -> TrainingLoss:
        """``|x - x^|^2 + lambda |relu(gate)|_1 + |x - decode_frozen(relu(gate))|^2``.

        The auxiliary term sees copies of `W_dec` and `b_dec` that receive no gradient; without the term nothing would
        hold the gate open. The decoder's rows are expected to have unit norm.
        """
        gate, latents = self._gate_and_latents(self._project(x, None), None)
        reconstruction = self.decode(latents, x)
        open_gate = torch.relu(gate)
        auxiliary = open_gate @ self.W_dec.detach() + self.b_dec.detach()
        terms = {
            "reconstruction": (x - reconstruction).square().sum(-1).mean(),
            "sparsity": sparsity_coefficient * open_gate.sum(-1).mean(),
            "auxiliary": (x - auxiliary).square().sum(-1).mean(),
        }
        return TrainingLoss.of(terms, reconstruction, latents)

    @torch.no_grad()
    def to_jumprelu(self) -> JumpReLUSAE:
        """Return the JumpReLU SAE that computes the same function.

        ``threshold = max(b_mag - exp(r_mag) * b_gate, 0)``; where that difference is negative the magnitude's ReLU,
        and not the gate, decides which latents are on.

        Source: arXiv 2404.16014, appendix E.
        """
        scale = self.r_mag.exp()
        return _converted(
            JumpReLUSAE(JumpReLUSAEConfig(**_shared_settings(self.config))),
            self,
            W_enc_T=scale[:, None] * self.W_enc_T,
            b_enc=self.b_mag,
            threshold=torch.relu(self.b_mag - scale * self.b_gate),
        )

    @classmethod
    @torch.no_grad()
    def from_jumprelu(cls, sae: JumpReLUSAE) -> GatedSAE:
        """Return the Gated SAE that computes the same function: ``r_mag = 0``, ``b_gate = b_enc - threshold``."""
        return _converted(
            cls(GatedSAEConfig(**_shared_settings(sae.config))),
            sae,
            W_enc_T=sae.W_enc_T,
            b_mag=sae.b_enc,
            b_gate=sae.b_enc - sae.threshold,
            r_mag=torch.zeros_like(sae.b_enc),
        )


def _shared_settings(config: SAEConfig) -> dict[str, Any]:
    """Return the settings that every architecture's configuration has."""
    return {name: getattr(config, name) for name in SAEConfig.__annotations__ if name != "has_no_defaults_at_init"}


def _converted(target: SAE, source: SAEModel, **tensors: Tensor) -> SAE:
    """Fill `target` with the given tensors and those that both have under the same meaning."""
    names = (
        "W_dec",
        "b_dec",
        "max_activation",
        "mean_activation",
        *(("W_skip",) if source.config.skip_connection else ()),
    )
    shared = {name: getattr(source, name) for name in names}
    nn.Module.to(target, device=source.W_dec.device, dtype=source.W_dec.dtype)
    target.load_state_dict({**shared, **tensors})
    return target.train(source.training)
