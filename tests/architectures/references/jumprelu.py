"""The JumpReLU SAE: Rajamanoharan et al. 2024b (arXiv 2407.14435), sections 2 and 3.

The tanh penalty: Conerly et al. 2025, Anthropic's "Circuits Updates - January 2025".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Array, Parameters, Terms, decode, decoder_norms, pre_latents, relu, squared_error

VARIANTS = [{}, {"tanh_scale": 4.0}]


def jump(z: Array, threshold: Array) -> Array:
    """Return ``z`` where it is positive and above its threshold, and zero elsewhere."""
    return np.where(z > threshold, relu(z), 0.0)


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``JumpReLU_theta(W_enc x + b_enc)``."""
    return jump(pre_latents(x, p, config), p["threshold"])


def objective(
    x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float, **variant: float
) -> Terms:
    """Return the squared error and ``lambda |f|_0``, or ``lambda sum_i tanh(c |W_d,i| f_i)``."""
    return jump_terms(encode(x, p, config), x, target, p, config, coefficient, **variant)


def jump_terms(
    latents: Array,
    x: Array,
    target: Array,
    p: Parameters,
    config: Any,
    coefficient: float,
    tanh_scale: float | None = None,
) -> Terms:
    """Return the terms from latents."""
    paid = (latents > 0).astype(float)
    if tanh_scale is not None:
        paid = np.tanh(tanh_scale * decoder_norms(p) * latents)
    return {
        "reconstruction": squared_error(target, decode(latents, x, p, config)),
        "sparsity": coefficient * float(paid.sum(-1).mean()),
    }
