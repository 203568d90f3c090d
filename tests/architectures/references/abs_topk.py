"""The AbsTopK SAE (arXiv 2510.00404): the `k` pre-latents that are farthest from zero, with their signs."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Array, Parameters, pre_latents
from .topk import largest, nested_objective

VARIANTS = [{}, {"prefixes": (0.25, 0.5)}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``z_i`` where ``|z_i|`` is among the `k` largest, and zero elsewhere."""
    z = pre_latents(x, p, config)
    return largest(z, np.abs(z), config.k)


objective = nested_objective(encode)
