"""The TopK SAE of Gao et al. 2024 (arXiv 2406.04093)."""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import topk
from ..modeling import SAEConfig, SAEModel, TrainingLoss


@strict
class TopKSAEConfig(SAEConfig):
    """Configuration of a `TopKSAE`.

    Attributes:
        k: number of latents kept per token.
    """

    model_type = "topk_sae"

    k: int = 32

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}.")


class TopKSAE(SAEModel):
    """``latents = topk(relu((x - b_dec) @ W_enc + b_enc), k)``.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: arXiv 2406.04093, section 2.3.
    """

    config: TopKSAEConfig
    config_class = TopKSAEConfig
    elementwise: ClassVar[bool] = False  # whether a latent is kept depends on all others

    def __init__(self, config: TopKSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = topk(self._project(x, None) + self.b_enc, self.config.k)
        return kept if latents is None else kept[..., latents]

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float = 0.0) -> TrainingLoss:
        """``|x - x^|^2``; sparsity is exact by construction and `sparsity_coefficient` has no effect."""
        latents = self._encode(x, None)
        reconstruction = self.decode(latents, x)
        terms = {"reconstruction": (x - reconstruction).square().sum(-1).mean()}
        return TrainingLoss.of(terms, reconstruction, latents)
