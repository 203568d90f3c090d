"""The GroupMax SAE: EleutherAI/sparsify, ``activation = "groupmax"``.

There the pre-latents after a ReLU are split into groups of neighbours, and each group keeps its largest.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from . import Array, Parameters, pre_latents
from .topk import nested_objective

VARIANTS = [{}, {"prefixes": (0.25, 0.5)}]


def settings(random: Random, d_sae: int) -> dict[str, Any]:
    """Draw the number of groups, a divisor of `d_sae`."""
    return {"groups": random.choice([groups for groups in range(1, d_sae + 1) if d_sae % groups == 0])}


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return the largest pre-latent of every group if it is positive, and zero elsewhere."""
    z = pre_latents(x, p, config)
    latents, size = np.zeros_like(z), z.shape[-1] // config.groups
    for token, values in enumerate(z):
        for first in range(0, len(values), size):
            best = max(range(first, first + size), key=lambda latent: values[latent])
            latents[token, best] = max(values[best], 0.0)
    return latents


objective = nested_objective(encode)
