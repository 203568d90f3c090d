"""The Gated SAE with two encoders: Rajamanoharan et al. 2024 (arXiv 2404.16014), equation 6, untied."""

from __future__ import annotations

from typing import Any

from . import Array, Parameters, Terms, centred, relu
from .gated import gate, gated_terms

VARIANTS = [{}, {"auxiliary": False}, {"frozen_decoder": False}, {"weighted_by_decoder_norm": True}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``1[W_gate (x - b_dec) + b_gate > 0] * ReLU(W_mag (x - b_dec) + b_mag)``."""
    magnitude = relu(centred(x, p, config) @ p["W_mag_T"].T + p["b_mag"])
    return (gate(x, p, config) > 0).astype(float) * magnitude


def objective(
    x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float, **variant: bool
) -> Terms:
    """Return the terms of equation 8."""
    latents, opened = encode(x, p, config), relu(gate(x, p, config))
    return gated_terms(latents, opened, x, target, p, config, coefficient=coefficient, power=power, **variant)
