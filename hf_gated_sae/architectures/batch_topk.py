"""The BatchTopK SAE of Bussmann et al. 2024 (arXiv 2412.06410)."""

from __future__ import annotations

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import batch_topk, jumprelu
from ..functional.search import lowest_projection
from ..modeling import SAEConfig, SAEModel, TrainingLoss


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

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float = 0.0) -> TrainingLoss:
        """``|x - x^|^2`` on the batch's largest latents; also moves the running threshold.

        `sparsity_coefficient` has no effect: sparsity is exact by construction.
        """
        latents = batch_topk(self._project(x, None) + self.b_enc, self.config.k)
        with torch.no_grad():
            kept = latents[latents > 0]
            if len(kept):
                self.threshold.lerp_(kept.min().to(self.threshold.dtype), 1 - self.config.threshold_momentum)
        reconstruction = self.decode(latents, x)
        terms = {"reconstruction": (x - reconstruction).square().sum(-1).mean()}
        return TrainingLoss.of(terms, reconstruction, latents)
