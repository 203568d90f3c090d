"""The SAE with a gated linear unit as its encoder: OpenMOSS/Language-Model-SAEs, ``use_glu_encoder``.

There the pre-latents are ``hidden_pre = (x @ W_E + b_E) * sigmoid(x @ W_E_glu + b_E_glu)``. The activation function
here is a JumpReLU, and the training objective is that of the JumpReLU SAE (arXiv 2407.14435).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Array, Parameters, Terms, centred, pre_latents
from .jumprelu import jump, jump_terms

VARIANTS = [{}, {"tanh_scale": 4.0}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return the gated pre-latents that are above their thresholds."""
    gate = centred(x, p, config) @ p["W_glu_T"].T + p["b_glu"]
    share = np.where(gate < 0, np.exp(-np.abs(gate)), 1.0) / (1 + np.exp(-np.abs(gate)))  # sigmoid without overflow
    return jump(pre_latents(x, p, config) * share, p["threshold"])


def objective(
    x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float, **variant: float
) -> Terms:
    """Return the terms of the JumpReLU SAE."""
    return jump_terms(encode(x, p, config), x, target, p, config, coefficient, **variant)
