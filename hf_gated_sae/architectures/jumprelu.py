"""The JumpReLU SAE of Rajamanoharan et al. 2024b (arXiv 2407.14435)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..errors import InputError
from ..functional import above_threshold, jumprelu
from ..functional.activations import lowest_projection
from ..functional.support import Support
from ..modeling import Objective, SAEConfig, SAEModel, Sparsity, TrainingLoss, squared_error

if TYPE_CHECKING:
    from .glu import GLUSAE

INITIAL_THRESHOLD = 1e-3


@dataclass(frozen=True)
class JumpReLUObjective(Objective):
    """``|y - y^|^2 + lambda L0``, with straight-through gradients for the threshold.

    Attributes:
        tanh_scale: if given, ``sum_i tanh(tanh_scale |W_dec[i]| latents_i)`` replaces L0; then sparsity has a
            gradient everywhere, and the decoder need not have unit norm.

    Source: arXiv 2407.14435, section 3; Conerly et al. 2025 (Anthropic's update of January 2025) for the tanh.
    """

    penalises: ClassVar[bool] = True

    tanh_scale: float | None = None

    def loss(self, sae: JumpReLUSAE | GLUSAE, x: Tensor, target: Tensor, sparsity: Sparsity) -> TrainingLoss:
        """Return the objective on some activations; arguments as for `Objective.loss`."""
        support, pre_latents = sae.pre_latents_of(x)
        threshold = sae._take(sae.threshold, support.latents)
        latents = jumprelu(pre_latents, threshold, bandwidth=sae.config.bandwidth)
        reconstruction = support.decode(latents, sae.W_dec) + sae.constant(x)
        if self.tanh_scale is None:
            penalty = above_threshold(pre_latents, threshold, bandwidth=sae.config.bandwidth)
        else:
            norms = sae._take(sae.W_dec.norm(dim=-1), support.latents)
            penalty = (self.tanh_scale * norms * latents).tanh()
        terms = {
            "reconstruction": squared_error(target, reconstruction),
            "sparsity": sparsity.coefficient * support.mean_sum(penalty),
        }
        return TrainingLoss.of(terms, reconstruction, support.code(latents))

    @torch.no_grad()
    def constrain(self, sae: JumpReLUSAE | GLUSAE) -> None:
        """Raise negative thresholds to 0, which changes no latent.

        With `tanh_scale` a threshold of 0 stays there, as its derivative is proportional to it; the plain penalty
        moves it away again.
        """
        sae.threshold.clamp_(min=0)


class StraightThroughConfig:
    """The part of a configuration for thresholds that are trained by straight-through gradients."""

    bandwidth: float

    def validate_bandwidth(self) -> None:
        """Check that the estimator's kernel has a width."""
        if not 0 < self.bandwidth < math.inf:
            raise InputError(f"bandwidth is {self.bandwidth}, expected a finite positive number.")


@strict
class JumpReLUSAEConfig(StraightThroughConfig, SAEConfig):
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
    objective_class = JumpReLUObjective
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

    def pre_latents_of(self, x: Tensor) -> tuple[Support, Tensor]:
        """Return the support of the objective and its pre-latents: those inside or above the estimator's kernel.

        Args:
            x: activations ``[..., d_in]``.
        """
        support = self._support(x, lowest_projection(self.threshold - self.config.bandwidth / 2, self.b_enc))
        return support, support.projection + self._take(self.b_enc, support.latents)
