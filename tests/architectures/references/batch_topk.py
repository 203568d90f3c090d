"""The BatchTopK SAE: Bussmann et al. 2024 (arXiv 2412.06410), section 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import Array, Parameters, Terms, pre_latents, relu
from .jumprelu import jump
from .topk import nested_terms

VARIANTS = [{}, {"prefixes": (0.25, 0.5)}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return the pre-latents above the single threshold, which replaces the selection after training."""
    return jump(pre_latents(x, p, config), p["threshold"])


def objective(
    x: Array,
    target: Array,
    p: Parameters,
    config: Any,
    *,
    coefficient: float,
    power: float,
    prefixes: Sequence[float] = (),
) -> Terms:
    """Return the squared errors of the ``k * tokens`` largest latents in the whole batch."""
    values = relu(pre_latents(x, p, config))
    latents = np.zeros(values.size)
    for at in np.argsort(-values.reshape(-1), kind="stable")[: config.k * len(x)]:
        latents[at] = values.reshape(-1)[at]
    return nested_terms(latents.reshape(values.shape), x, target, p, config, prefixes)
