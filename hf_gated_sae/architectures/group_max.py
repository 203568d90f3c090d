"""The GroupMax SAE of EleutherAI's sparsify: the largest latent of every group."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ..errors import InputError
from ..modeling import SAEConfig, TopKBaseSAE


@strict
class GroupMaxSAEConfig(SAEConfig):
    """Configuration of a `GroupMaxSAE`.

    Attributes:
        groups: number of groups of equal size; at most one latent of each is on, so this is the largest L0.
    """

    model_type = "group_max_sae"

    groups: int = 8

    def validate_groups(self) -> None:
        """Check that the latents can be divided into groups."""
        if self.groups < 1 or self.d_sae % self.groups:
            raise InputError(f"groups is {self.groups}, expected a divisor of d_sae = {self.d_sae}.")


class GroupMaxSAE(TopKBaseSAE):
    """``z = (x - b_dec) @ W_enc + b_enc``; ``latents = relu(z) * [z is the largest of its group]``.

    Group ``g`` is the ``d_sae / groups`` neighbouring latents from ``g * d_sae / groups`` on.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.

    Source: EleutherAI/sparsify, activation ``groupmax``.
    """

    config: GroupMaxSAEConfig
    config_class = GroupMaxSAEConfig

    @property
    def latents_per_token(self) -> int:
        """Number of latents kept per token: one of each group."""
        return self.config.groups

    def _choose(self, values: Tensor) -> tuple[Tensor, Tensor]:
        grouped = values.unflatten(-1, (self.config.groups, -1))
        largest, place = grouped.max(-1)
        firsts = torch.arange(0, self.config.d_sae, grouped.shape[-1], device=place.device)
        return place + firsts, largest
