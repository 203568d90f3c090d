"""The Gated SAE: Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 6 to 8, and the variants of section 5."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Array, Parameters, Terms, centred, decode, relu, squared_error
from .standard import penalty

# `frozen_decoder` and `learn_r_mag` affect gradients only.
VARIANTS = [
    {},
    {"auxiliary": False},
    {"frozen_decoder": False},
    {"learn_r_mag": False},
    {"tied_b_mag": True},
    {"rescale_and_shift": True},
    {"weighted_by_decoder_norm": True},
]


def gate(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``pi_gate = W_gate (x - b_dec) + b_gate``."""
    return centred(x, p, config) @ p["W_enc_T"].T + p["b_gate"]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``1[pi_gate > 0] * ReLU(W_mag (x - b_dec) + b_mag)`` with ``W_mag = exp(r_mag) * W_gate``."""
    w_mag = np.exp(p["r_mag"])[:, None] * p["W_enc_T"]
    is_open = (gate(x, p, config) > 0).astype(float)
    return is_open * relu(centred(x, p, config) @ w_mag.T + p["b_mag"])


def objective(
    x: Array,
    target: Array,
    p: Parameters,
    config: Any,
    *,
    coefficient: float,
    power: float,
    tied_b_mag: bool = False,
    rescale_and_shift: bool = False,
    learn_r_mag: bool = True,
    **variant: bool,
) -> Terms:
    """Return the terms of equation 8; for "rescale & shift" (section 5.2) the reconstruction alone."""
    if tied_b_mag:
        p = {**p, "b_mag": np.exp(p["r_mag"]) * p["b_gate"]}
    latents, opened = encode(x, p, config), relu(gate(x, p, config))
    terms = gated_terms(latents, opened, x, target, p, config, coefficient=coefficient, power=power, **variant)
    return {"reconstruction": terms["reconstruction"]} if rescale_and_shift else terms


def gated_terms(
    latents: Array,
    opened: Array,
    x: Array,
    target: Array,
    p: Parameters,
    config: Any,
    *,
    coefficient: float,
    power: float,
    auxiliary: bool = True,
    weighted_by_decoder_norm: bool = False,
    frozen_decoder: bool = True,
) -> Terms:
    """Return the terms of equation 8 from latents and ``ReLU(pi_gate)``."""
    terms = {
        "reconstruction": squared_error(target, decode(latents, x, p, config)),
        "sparsity": penalty(opened, p, coefficient, power, weighted_by_decoder_norm),
    }
    if auxiliary:
        terms["auxiliary"] = squared_error(target, decode(opened, x, p, config))
    return terms
