"""The JumpReLU SAE of Rajamanoharan et al. 2024b (arXiv 2407.14435)."""

from __future__ import annotations

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..functional import jumprelu, l0_surrogate
from ..functional.search import lowest_projection
from ..modeling import SAEConfig, SAEModel, TrainingLoss

INITIAL_THRESHOLD = 1e-3


@strict
class JumpReLUSAEConfig(SAEConfig):
    """Configuration of a `JumpReLUSAE`.

    Attributes:
        bandwidth: width of the straight-through estimator's kernel, in units of the pre-latents.
    """

    model_type = "jumprelu_sae"

    bandwidth: float = 1e-3


class JumpReLUSAE(SAEModel):
    """``z = (x - b_dec) @ W_enc + b_enc``; ``latents = relu(z) * [z > threshold]``.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.
        threshold: ``[d_sae]``, not negative, kept in float32.

    Source: arXiv 2407.14435, sections 2 and 3.
    """

    config: JumpReLUSAEConfig
    config_class = JumpReLUSAEConfig
    _keep_in_fp32_modules_strict = [*SAEModel._keep_in_fp32_modules_strict, "threshold"]

    def __init__(self, config: JumpReLUSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.threshold = nn.Parameter(torch.empty(config.rows, dtype=torch.float32))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.threshold, INITIAL_THRESHOLD)

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        pre_latents = projection + self._take(self.b_enc, latents)
        return jumprelu(pre_latents, self._take(self.threshold, latents), bandwidth=self.config.bandwidth)

    def _cut(self) -> Tensor:
        return lowest_projection(torch.relu(self.threshold), self.b_enc)

    def training_loss(self, x: Tensor, *, sparsity_coefficient: float) -> TrainingLoss:
        """``|x - x^|^2 + lambda L0``, the threshold learning by straight-through gradients."""
        pre_latents = self._project(x, None) + self.b_enc
        latents = jumprelu(pre_latents, self.threshold, bandwidth=self.config.bandwidth)
        reconstruction = self.decode(latents, x)
        l0 = l0_surrogate(pre_latents, self.threshold, bandwidth=self.config.bandwidth)
        terms = {
            "reconstruction": (x - reconstruction).square().sum(-1).mean(),
            "sparsity": sparsity_coefficient * l0.mean(),
        }
        return TrainingLoss.of(terms, reconstruction, latents)
