"""The tanh SAE: a ReLU whose latents saturate at one."""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..modeling import SAEConfig, SAEModel, TrainingLoss


@strict
class TanhReLUSAEConfig(SAEConfig):
    """Configuration of a `TanhReLUSAE`."""

    model_type = "tanh_relu_sae"


class TanhReLUSAE(SAEModel):
    """``latents = tanh(relu((x - b_dec) @ W_enc + b_enc))``, between 0 and 1.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: SAELens, ``activation_fn_str = "tanh-relu"`` of versions 3 to 5.
    """

    config: TanhReLUSAEConfig
    config_class = TanhReLUSAEConfig
    homogeneous: ClassVar[bool] = False

    def __init__(self, config: TanhReLUSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return torch.relu(projection + self._take(self.b_enc, latents)).tanh()

    def _cut(self) -> Tensor:
        return -self.b_enc

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float) -> TrainingLoss:
        """``|x - x^|^2 + lambda |latents|_1``."""
        latents = self._encode(x, None)
        reconstruction = self.decode(latents, x)
        terms = {
            "reconstruction": (x - reconstruction).square().sum(-1).mean(),
            "sparsity": sparsity_coefficient * latents.sum(-1).mean(),
        }
        return TrainingLoss.of(terms, reconstruction, latents)
