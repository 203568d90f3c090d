"""A loss term that raises the pre-activations of dead latents to their threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...modeling import SAEModel, TrainingLoss
from .base import DeadLatentRemedy


class PreActivationPull(DeadLatentRemedy):
    """``coefficient * sum over dead latents of relu(threshold - pre_latent) * |W_dec[i]|``, a mean over tokens.

    Every dead latent is pulled towards firing on every token, with a gradient that does not depend on its distance
    from the threshold. The decoder norms pass no gradient: otherwise a shorter decoder row would reduce the term.

    Source: Conerly et al. 2025, "Dictionary Learning Optimization Techniques" (Transformer Circuits, January update).
    """

    name: ClassVar[str] = "pre_activation_pull"

    def terms(self, sae: SAEModel, x: Tensor, target: Tensor, loss: TrainingLoss) -> Mapping[str, Tensor]:
        """Return the term; none while no latent is dead."""
        dead = self.dead.indices
        if not len(dead):
            return {}
        weights = sae.W_dec.detach().index_select(0, dead).norm(dim=-1)
        shortfall = torch.relu(-sae.margins(x, dead)) @ weights
        return {"pull": self.args.pull_coefficient * shortfall.mean()}
