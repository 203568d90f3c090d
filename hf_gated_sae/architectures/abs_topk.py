"""The AbsTopK SAE of arXiv 2510.00404: latents of both signs."""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional.activations import scattered
from ..modeling import SAEConfig, SAEModel, TrainingLoss
from ..modeling.output import reconstruction_loss


@strict
class AbsTopKSAEConfig(SAEConfig):
    """Configuration of an `AbsTopKSAE`.

    Attributes:
        k: number of latents kept per token.
    """

    model_type = "abs_topk_sae"

    k: int = 32

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}.")


class AbsTopKSAE(SAEModel):
    """``z = (x - b_dec) @ W_enc + b_enc``; ``latents = z * [|z| is among the k largest]``.

    One latent stands for a direction and its opposite, so that latents may be negative.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: arXiv 2510.00404.
    """

    config: AbsTopKSAEConfig
    config_class = AbsTopKSAEConfig
    elementwise: ClassVar[bool] = False  # whether a latent is kept depends on all others
    signed: ClassVar[bool] = True

    def __init__(self, config: AbsTopKSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = scattered(*self._kept(x), self.config.d_sae)
        return kept if latents is None else kept[..., latents]

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre_latents = self._project(x, None) + self.b_enc
        indices = pre_latents.abs().topk(self.config.k, dim=-1, sorted=False).indices
        return indices, pre_latents.gather(-1, indices)

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float = 0.0) -> TrainingLoss:
        """``|x - x^|^2``; sparsity is exact by construction and `sparsity_coefficient` has no effect."""
        return reconstruction_loss(self, x)
