"""The BatchTopK SAE of Bussmann et al. 2024 (arXiv 2412.06410)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import cpu, jumprelu
from ..functional.activations import largest, lowest_projection
from ..functional.support import Support
from ..functional.tensor_checks import is_transformed
from ..modeling import SAEConfig, SAEModel, Sparsity, TopKObjective, TrainingLoss

SAMPLE = 64
"""Number of tokens from which the smallest latent that the batch keeps is guessed."""

MARGIN = 1.25
"""Number of latents above the guess, as a multiple of those that are kept."""


@dataclass(frozen=True)
class BatchTopKObjective(TopKObjective):
    """``|y - y^|^2`` on the batch's largest latents.

    Where gradients are recorded it also moves the running threshold, except under `torch.func`, which needs a function
    without side effects.
    """

    def loss(self, sae: BatchTopKSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support, latents, lowest = sae.largest(x)
        if torch.is_grad_enabled() and not is_transformed(lowest):
            sae.move_threshold(lowest)
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

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the pre-latents of some latents, which compete in training; see `SAEModel.margins`."""
        return self._project(x, latents) + self._take(self.b_enc, latents)

    def largest(self, x: Tensor) -> tuple[Support, Tensor, Tensor]:
        """Return the support of the objective, the batch's ``k * tokens`` largest latents on it, and their minimum.

        Args:
            x: activations ``[..., d_in]``.
        """
        wanted = self.config.k * math.prod(x.shape[:-1])
        alone = self.data_group is None  # in other processes some of the largest may be below what is guessed here
        few = self.config.k <= cpu.DENSEST * self.config.d_sae
        guess = self._guess(x) if alone and few and cpu.serves_sparse_step(x, self.W_enc_T) else None
        support = self._support(x, None if guess is None else lowest_projection(guess, self.b_enc))
        pre_latents = support.projection + self._take(self.b_enc, support.latents)
        if guess is not None and support.latents is not None and int((pre_latents > guess).sum()) < wanted:
            # Some of the largest are below the guess.
            support = self._support(x, None)
            pre_latents = support.projection + self.b_enc
        if self.data_group is None:
            latents = largest(pre_latents, wanted)
            kept = latents.detach()[latents > 0]
            return support, latents, kept.min() if len(kept) else kept.new_zeros(())
        lowest = self.data_group.lowest_of_largest(pre_latents.detach(), wanted)
        return support, torch.relu(pre_latents) * (pre_latents >= lowest), lowest

    @torch.no_grad()
    def move_threshold(self, lowest: Tensor) -> None:
        """Move the running threshold towards the smallest latent that a batch kept, ``[]``; 0 if it kept none."""
        lowest = lowest.to(self.threshold.dtype)
        moved = self.threshold.lerp(lowest, 1 - self.config.threshold_momentum)
        moved = torch.where(self.threshold > 0, moved, lowest)  # a mean that started at 0 would lag for long
        self.threshold.copy_(torch.where(lowest > 0, moved, self.threshold))

    @torch.no_grad()
    def _guess(self, x: Tensor) -> Tensor | None:
        """Return a value that the batch's smallest kept latent is rarely below, ``[]``; None if that might be 0."""
        flat = x.reshape(-1, x.shape[-1])
        sample = flat[:: max(1, len(flat) // SAMPLE)]
        pre_latents = (self._project(sample, None) + self.b_enc).reshape(-1)
        rank = min(math.ceil(MARGIN * self.config.k * len(sample)), len(pre_latents))
        guess = pre_latents.topk(rank, sorted=False).values.min()
        return guess if guess > 0 else None
