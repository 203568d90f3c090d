"""The standard (ReLU, L1) SAE: the paper's baseline."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..modeling import SAEConfig, SAEModel, TrainingLoss


@strict
class StandardSAEConfig(SAEConfig):
    """Configuration of a `StandardSAE`."""

    model_type = "standard_sae"


class StandardSAE(SAEModel):
    """``latents = relu((x - b_dec) @ W_enc + b_enc)``.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: Bricken et al. 2023; section 2 of Rajamanoharan et al. 2024 (arXiv 2404.16014).
    """

    config: StandardSAEConfig
    config_class = StandardSAEConfig

    def __init__(self, config: StandardSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(projection + self._take(self.b_enc, latents))

    def _cut(self) -> Tensor:
        return -self.b_enc

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float) -> TrainingLoss:
        """``|x - x^|^2 + lambda |latents|_1``; the decoder's rows are expected to have unit norm."""
        latents = self._encode(x, None)
        reconstruction = self.decode(latents, x)
        terms = {
            "reconstruction": (x - reconstruction).square().sum(-1).mean(),
            "sparsity": sparsity_coefficient * latents.sum(-1).mean(),
        }
        return TrainingLoss.of(terms, reconstruction, latents)
