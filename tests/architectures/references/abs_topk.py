"""The AbsTopK SAE (arXiv 2510.00404): the `k` pre-latents that are farthest from zero, with their signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import Array, Parameters, Terms, pre_latents
from .topk import largest, nested_terms

VARIANTS = [{}, {"prefixes": (0.25, 0.5)}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``z_i`` where ``|z_i|`` is among the `k` largest, and zero elsewhere."""
    z = pre_latents(x, p, config)
    return largest(z, np.abs(z), config.k)


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
    """Return the squared error, and that of every prefix of the latents."""
    return nested_terms(encode(x, p, config), x, target, p, config, prefixes)
