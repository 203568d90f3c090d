"""Ghost gradients: dead latents, made to fire, are pulled towards the residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...functional.linear import linear
from ...modeling import SAEModel, TrainingLoss
from .base import DeadLatentRemedy


class GhostGradients(DeadLatentRemedy):
    """A second forward through the dead latents alone, with an exponential in place of their activation.

    What they write is scaled at each token to half the norm of the residual, and their squared error to that of the
    reconstruction; neither scale, nor the residual, passes a gradient.

    For comparison with runs that used it. Where only a few latents are dead, what they write at half the norm of the
    residual overshoots it in their own directions, and pushes them further down rather than up.

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
        # The scale of each token is divided out below; without the largest the exponential would overflow.
        values = (values - values.detach().amax(-1, keepdim=True)).exp()
        ghost = linear(values, sae.W_dec.index_select(0, dead).T)
        tiny = torch.finfo(ghost.dtype).tiny
        norm = residual.norm(dim=-1, keepdim=True)
        ghost = ghost * (norm / (2 * ghost.detach().norm(dim=-1, keepdim=True)).clamp_min(tiny))
        error = (residual - ghost).square().sum(-1).mean()
        ours = residual.square().sum(-1).mean()
        of_all = self.grid.data.mean(torch.stack([ours, error.detach()]))
        return {"ghost": error * (of_all[0] / of_all[1].clamp_min(tiny))}
