"""Pulling the pre-activations of dead latents up to the point where they fire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...modeling import SAEModel, TrainingLoss
from .base import DeadLatentRemedy


class PreActivationPull(DeadLatentRemedy):
    """``coefficient * sum over dead latents of relu(threshold - pre_latent) * |W_dec[i]|``, a mean over tokens.

    Every dead latent is pulled towards firing on every token, by a force that does not depend on how far it is. The
    decoder's norms pass no gradient: a dead latent is not to save itself by writing less.

    Source: Conerly et al. 2025, "Dictionary Learning Optimization Techniques" (Transformer Circuits, January update).
    """

    name: ClassVar[str] = "pre_activation_pull"

    def terms(self, sae: SAEModel, x: Tensor, target: Tensor, loss: TrainingLoss) -> Mapping[str, Tensor]:
        """Return the pull; none while no latent is dead."""
        dead = self.dead.indices
        if not len(dead):
            return {}
        weights = sae.W_dec.detach().index_select(0, dead).norm(dim=-1)
        missing = torch.relu(-sae.margins(x, dead)) @ weights
        return {"pull": self.args.pull_coefficient * missing.mean()}
