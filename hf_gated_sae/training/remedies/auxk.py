"""AuxK: dead latents are trained to reconstruct the error of the live ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...functional.sparse_decode import decode
from ...modeling import SAEModel, TrainingLoss
from ..processes import Processes
from .base import DeadLatentRemedy


class AuxK(DeadLatentRemedy):
    r"""The dead latents with the largest pre-latents reconstruct the error, which gives them gradients.

    ``coefficient * E|y - mean y|^2 * E|e - e^|^2 / E|e - mean e|^2`` with ``e = y - y^``, detached, and ``e^`` decoded
    from the ``auxk_latents`` largest pre-latents of dead latents. The source divides both errors by their values
    without any latent; here the term is on the scale of the reconstruction term.

    If latents compete (TopK and its variants), dead ones pass through the ReLU of the source, or unchanged if latents
    are signed. In other architectures a dead latent is below its threshold, where a ReLU would pass no gradient; there
    they pass through a softplus.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """

    name: ClassVar[str] = "auxk"

    def terms(self, sae: SAEModel, x: Tensor, target: Tensor, loss: TrainingLoss) -> Mapping[str, Tensor]:
        """Return the auxiliary term; none while no latent is dead."""
        dead = self.dead.indices
        if not len(dead):
            return {}
        error = (target - loss.reconstruction).detach()
        values = sae.margins(x, dead)
        wanted = self.args.auxk_latents or max(1, sae.config.d_in // 2)
        ranks = values.abs() if sae.signed else values
        best = ranks.topk(min(wanted, len(dead)), dim=-1, sorted=False).indices
        values = values.gather(-1, best)
        if not sae.objective_class.competes:
            values = torch.nn.functional.softplus(values)
        elif not sae.signed:
            values = torch.relu(values)
        selected = torch.zeros(len(x), len(dead), dtype=values.dtype, device=values.device).scatter(-1, best, values)
        remaining = (error - decode(selected, sae.W_dec.index_select(0, dead))).square().sum(-1).mean()
        error_variance, variance = _variances(error, target, self.grid.data)
        tiny = torch.finfo(remaining.dtype).tiny
        share = torch.where(error_variance > 0, remaining / error_variance.clamp_min(tiny), 0.0)
        return {"auxk": self.args.auxk_coefficient * variance * share}


@torch.no_grad()
def _variances(x: Tensor, y: Tensor, processes: Processes) -> Tensor:
    """Return ``E|x - mean x|^2`` and ``E|y - mean y|^2`` of ``[n, d]``, over the batch of all processes, ``[2]``."""
    means = processes.mean(torch.stack([x.mean(0), y.mean(0)]))
    return processes.mean(
        torch.stack([(each - mean).square().sum(-1).mean() for each, mean in zip((x, y), means, strict=True)])
    )
