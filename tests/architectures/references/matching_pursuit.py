"""The matching-pursuit SAE: Costa et al. 2025 (arXiv 2506.03093), section 3.

The three stopping rules: SAELens, `MatchingPursuitSAEConfig`.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from . import Array, Parameters, Terms, centred, decode, squared_error


def settings(random: Random, d_sae: int) -> dict[str, Any]:
    """Draw the stopping rules; input and output have the same width."""
    return {
        "d_out": None,
        "residual_threshold": random.choice([0.0, 1e-2, 0.5]),
        "max_iterations": random.choice([None, 1, 2, 6]),
        "stop_on_duplicate_support": random.random() < 0.5,
    }


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """For each token, subtract the best matching decoder row from the residual until a stopping rule applies."""
    latents = np.zeros((len(x), len(p["W_dec"])))
    for token, left in enumerate(centred(x, p, config)):
        for _ in range(config.max_iterations or x.shape[-1]):
            matches = p["W_dec"] @ left
            best = int(np.argmax(matches))
            support = set(np.flatnonzero(latents[token]))
            if matches[best] > 0:
                latents[token, best] += matches[best]
                left = left - matches[best] * p["W_dec"][best]
            if config.stop_on_duplicate_support and set(np.flatnonzero(latents[token])) == support:
                break
            if np.linalg.norm(left) < config.residual_threshold:
                break
    return latents


def objective(x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float) -> Terms:
    """Return the squared error."""
    return {"reconstruction": squared_error(target, decode(encode(x, p, config), x, p, config))}
