"""The BatchTopK SAE of Bussmann et al. 2024 (arXiv 2412.06410)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import jumprelu
from ..functional.activations import largest
from ..functional.search import lowest_projection
from ..functional.support import Support
from ..modeling import KeptObjective, SAEConfig, SAEModel, Sparsity, TrainingLoss

GUESS = 0.75
"""Times the running threshold: what the smallest latent that a batch keeps is hardly ever below."""


@dataclass(frozen=True)
class BatchTopKObjective(KeptObjective):
    """``|y - y^|^2`` on the batch's largest latents, which also moves the running threshold."""

    def loss(self, sae: BatchTopKSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support, latents = sae.largest(x)
        with torch.no_grad():
            kept = latents[latents > 0]
            if len(kept):
                sae.threshold.lerp_(kept.min().to(sae.threshold.dtype), 1 - sae.config.threshold_momentum)
        return self._reconstruction(sae, x, target, support, latents)


@strict
class BatchTopKSAEConfig(SAEConfig):
    """Configuration of a `BatchTopKSAE`.

    Attributes:
        k: mean number of latents kept per token in training.
        threshold_momentum: how much of the running threshold survives one training step.
    """

    model_type = "batch_topk_sae"

    k: int = 32
    threshold_momentum: float = 0.99

    def validate_k(self) -> None:
        """Check that `k` latents exist."""
        if not 1 <= self.k <= self.d_sae:
            raise InputError(f"k is {self.k}, expected 1 .. d_sae = {self.d_sae}.")


class BatchTopKSAE(SAEModel):
    """Trained with the ``k * tokens`` largest pre-latents of a batch, used with one threshold for all latents.

    ``z = (x - b_dec) @ W_enc + b_enc``; ``latents = relu(z) * [z > threshold]``. `encode` always uses the threshold,
    so that a token's latents do not depend on its neighbours; only `training_loss` selects by batch.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.
        threshold: scalar ``[]`` float32, the running mean of the smallest latent that training kept.

    Source: arXiv 2412.06410, section 3.
    """

    config: BatchTopKSAEConfig
    config_class = BatchTopKSAEConfig
    objective_class = BatchTopKObjective
    threshold: Tensor
    _keep_in_fp32_modules_strict = [*SAEModel._keep_in_fp32_modules_strict, "threshold"]

    def __init__(self, config: BatchTopKSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.register_buffer("threshold", torch.empty((), dtype=torch.float32))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.threshold)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        return jumprelu(projection + self._take(self.b_enc, latents), self.threshold)

    def _cut(self) -> Tensor:
        return lowest_projection(torch.relu(self.threshold), self.b_enc)

    def largest(self, x: Tensor) -> tuple[Support, Tensor]:
        """Return the support of the objective, and of the latents on it the batch's ``k * tokens`` largest.

        Args:
            x: activations ``[..., d_in]``.
        """
        wanted = self.config.k * math.prod(x.shape[:-1])
        guess = GUESS * self.threshold
        support = self._support(x, lowest_projection(guess, self.b_enc) if guess > 0 else None)
        pre_latents = support.projection + self._take(self.b_enc, support.latents)
        if support.latents is not None and int((pre_latents > guess).sum()) < wanted:  # more lie below the guess
            support = self._support(x, None)
            pre_latents = support.projection + self.b_enc
        return support, largest(pre_latents, wanted)
