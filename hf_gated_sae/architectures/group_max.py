"""The GroupMax SAE of EleutherAI's sparsify: the largest latent of every group."""

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
class GroupMaxSAEConfig(SAEConfig):
    """Configuration of a `GroupMaxSAE`.

    Attributes:
        groups: number of groups of equal size; at most one latent of each is on, so this is the largest L0.
    """

    model_type = "group_max_sae"

    groups: int = 8

    def validate_groups(self) -> None:
        """Check that the latents can be divided."""
        if self.groups < 1 or self.d_sae % self.groups:
            raise InputError(f"groups is {self.groups}, expected a divisor of d_sae = {self.d_sae}.")


class GroupMaxSAE(SAEModel):
    """``z = (x - b_dec) @ W_enc + b_enc``; ``latents = relu(z) * [z is the largest of its group]``.

    Group ``g`` is the ``d_sae / groups`` neighbouring latents from ``g * d_sae / groups`` on.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: EleutherAI/sparsify, activation ``groupmax``.
    """

    config: GroupMaxSAEConfig
    config_class = GroupMaxSAEConfig
    elementwise: ClassVar[bool] = False  # whether a latent is on depends on its whole group

    def __init__(self, config: GroupMaxSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.post_init()

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        kept = scattered(*self._kept(x), self.config.d_sae)
        return kept if latents is None else kept[..., latents]

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rectified = torch.relu(self._project(x, None) + self.b_enc).unflatten(-1, (self.config.groups, -1))
        largest, place = rectified.max(-1)
        firsts = torch.arange(0, self.config.d_sae, rectified.shape[-1], device=place.device)
        return place + firsts, largest

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float = 0.0) -> TrainingLoss:
        """``|x - x^|^2``; sparsity is exact by construction and `sparsity_coefficient` has no effect."""
        return reconstruction_loss(self, x)
