"""The tanh SAE: a ReLU whose latents saturate at one."""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..modeling import SAEConfig, SAEModel
from .standard import StandardObjective


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
    objective_class = StandardObjective
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
