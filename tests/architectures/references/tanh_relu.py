"""The ReLU SAE whose latents saturate: SAELens 3 to 5, ``activation_fn_str = "tanh-relu"``.

There ``tanh_relu(z) = tanh(relu(z))`` replaces the ReLU, also in the penalty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Array, Parameters, pre_latents, relu
from .standard import penalised_objective

VARIANTS = [{}, {"weighted_by_decoder_norm": True}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``tanh(relu(z))`` with the pre-latents ``z``."""
    z = relu(pre_latents(x, p, config))
    return 1 - 2 / (np.exp(2 * np.minimum(z, 300)) + 1)


objective = penalised_objective(encode)
