"""Ghost gradients: dead latents with an exponential activation are trained towards the reconstruction error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...functional.linear import linear
from ...modeling import SAEModel, TrainingLoss
from .base import DeadLatentRemedy


class GhostGradients(DeadLatentRemedy):
    """A second forward pass through the dead latents alone, with an exponential in place of their activation function.

    Their output is scaled at each token to half the norm of the residual, and their squared error to that of the
    reconstruction; neither the scales nor the residual pass a gradient.

    For comparison with runs that used it. If only a few latents are dead, their output at half the norm of the
    residual overshoots it in their own directions, which lowers their pre-latents further.

    Source: Jermyn and Templeton 2024, "Ghost Grads" (Transformer Circuits, January update).
    """

    name: ClassVar[str] = "ghost_gradients"

    def terms(self, sae: SAEModel, x: Tensor, target: Tensor, loss: TrainingLoss) -> Mapping[str, Tensor]:
        """Return the ghost term; none while no latent is dead."""
        dead = self.dead.indices
        if not len(dead):
            return {}
        residual = (target - loss.reconstruction).detach()
        values = sae.margins(x, dead)
        # Subtract the largest value, which cancels in the scaling below: the exponential would overflow.
        values = (values - values.detach().amax(-1, keepdim=True)).exp()
        ghost = linear(values, sae.W_dec.index_select(0, dead).T)
        tiny = torch.finfo(ghost.dtype).tiny
        norm = residual.norm(dim=-1, keepdim=True)
        ghost = ghost * (norm / (2 * ghost.detach().norm(dim=-1, keepdim=True)).clamp_min(tiny))
        error = (residual - ghost).square().sum(-1).mean()
        ours = residual.square().sum(-1).mean()
        of_all = self.grid.data.mean(torch.stack([ours, error.detach()]))
        return {"ghost": error * (of_all[0] / of_all[1].clamp_min(tiny))}
