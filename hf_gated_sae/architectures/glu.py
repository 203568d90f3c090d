"""The GLU-encoder SAE of OpenMOSS's llamascopium."""

from __future__ import annotations

from typing import ClassVar

import torch
import transformers.initialization as init
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..functional import jumprelu
from ..functional.support import Support
from ..modeling import SAEConfig, SAEModel
from .jumprelu import JumpReLUObjective, StraightThroughConfig


@strict
class GLUSAEConfig(StraightThroughConfig, SAEConfig):
    """Configuration of a `GLUSAE`.

    Attributes:
        bandwidth: width of the straight-through estimator's kernel, in units of the pre-latents.
    """

    model_type = "glu_sae"

    bandwidth: float = 1e-3


class GLUSAE(SAEModel):
    """An SAE in which a second encoder scales every pre-latent by a factor between 0 and 1.

    ``c = x - b_dec``; ``z = (c @ W_enc + b_enc) * sigmoid(c @ W_glu + b_glu)``;
    ``latents = relu(z) * [z > threshold]``, which with a threshold of zero is a ReLU.

    Attributes:
        b_enc: encoder bias ``[d_sae]``.
        W_glu_T: second encoder ``[d_sae, d_in]``.
        b_glu: its bias ``[d_sae]``.
        threshold: ``[d_sae]``, not negative, kept in float32.

    Source: OpenMOSS/Language-Model-SAEs, ``use_glu_encoder``.
    """

    config: GLUSAEConfig
    config_class = GLUSAEConfig
    objective_class = JumpReLUObjective
    homogeneous: ClassVar[bool] = False  # the second encoder's sigmoid
    _keep_in_fp32_modules_strict = [*SAEModel._keep_in_fp32_modules_strict, "threshold"]

    def __init__(self, config: GLUSAEConfig) -> None:
        """Allocate the parameters."""
        super().__init__(config)
        self.b_enc = nn.Parameter(torch.empty(config.rows))
        self.W_glu_T = nn.Parameter(torch.empty(config.rows, config.d_in))
        self.b_glu = nn.Parameter(torch.empty(config.rows))
        self.threshold = nn.Parameter(torch.empty(config.rows, dtype=torch.float32))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.W_glu_T)  # every latent at half strength, whatever the input

    def _gated(self, x: Tensor, projection: Tensor, latents: Tensor | None) -> Tensor:
        """Return the gated pre-latents ``z``."""
        weight, bias = self._take(self.W_glu_T, latents), self._take(self.b_glu, latents)
        gate = nn.functional.linear(self._centred(x), weight, bias)
        return (projection + self._take(self.b_enc, latents)) * torch.sigmoid(gate)

    def margins(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return how far gated pre-latents are above their thresholds; see `SAEModel.margins`."""
        return self._gated(x, self._project(x, latents), latents) - self._take(self.threshold, latents)

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        pre_latents = self._gated(x, self._project(x, latents), latents)
        return jumprelu(pre_latents, self._take(self.threshold, latents), bandwidth=self.config.bandwidth)

    def pre_latents_of(self, x: Tensor) -> tuple[Support, Tensor]:
        """Return all latents as the support of the objective, and their pre-latents.

        Args:
            x: activations ``[..., d_in]``.
        """
        support = self._support(x, None)
        return support, self._gated(x, support.projection, None)
