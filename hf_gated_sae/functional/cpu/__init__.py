"""What exists only for speed on a CPU, behind one interface.

Every function returns None where it does not apply: on another device, where gradients of gradients, a transformation
of `torch.func` or a compiler need the plain operations, where this CPU or this build of torch lacks what it needs, or
where the plain way is faster. Callers then compute the plain way; results agree to rounding.

`HF_GATED_SAE_PLAIN=1` in the environment, or ``with plain():``, turns all of it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from . import bf16_screening, products, tiled_projection
from .bf16_screening import autocast_rounds
from .reused_memory import ReusedMemory, forget
from .sparse_support import DENSEST, SparseSupport

__all__ = [
    "DENSEST",
    "ReusedMemory",
    "SparseSupport",
    "autocast_rounds",
    "decode",
    "enabled",
    "find_above",
    "forget",
    "highest",
    "linear",
    "plain",
    "project",
    "serves_sparse_step",
    "squared_error",
    "support_above",
]

_enabled = os.environ.get("HF_GATED_SAE_PLAIN", "0") != "1"  # not a ContextVar, which torch.compile cannot trace


def enabled() -> bool:
    """Whether the fast paths may be used."""
    return _enabled


@contextmanager
def plain() -> Iterator[None]:
    """Compute everything in this process the plain way, for comparison or to rule out an error in this package."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return ``x @ weight.T``, ``[..., n]``."""
    return products.linear(x, weight) if enabled() else None


def project(x: Tensor, shift: Tensor, W_enc_T: Tensor) -> Tensor | None:
    """Return ``(x - shift) @ W_enc``, ``[..., d_sae]``."""
    return products.project(x, shift, W_enc_T) if enabled() else None


def decode(values: Tensor, W_dec: Tensor) -> Tensor | None:
    """Return ``values @ W_dec``, ``[..., d_out]``."""
    return products.decode(values, W_dec) if enabled() else None


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor | None:
    """Return the mean over tokens of ``|target - reconstruction|^2``, ``[]``."""
    return products.squared_error(target, reconstruction) if enabled() else None


def find_above(x: Tensor, W_enc_T: Tensor, cut: Tensor, *, most: float = 1.0) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the projections ``x @ W_enc`` above a cut without ``[tokens, d_sae]`` in memory.

    Args:
        x: ``[tokens, d_in]``.
        W_enc_T: ``[d_sae, d_in]``.
        cut: ``[d_sae]``.
        most: return None as soon as more than this share of all projections is found.

    Returns:
        Tokens, latents and projections, ``[found]`` each: all that are above the cut, and perhaps a few others.
    """
    return tiled_projection.above(x, W_enc_T, cut, most=most) if enabled() else None


def highest(
    x: Tensor, W_enc_T: Tensor, bias: Tensor, k: int, *, rounding: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Return the `k` latents of each token with the highest ``x @ W_enc + bias``, and their projections.

    Both are ``[tokens, k]``; the projections are without the bias. With `rounding`, rounding to bfloat16 may decide
    between latents that are close to the k-th highest.
    """
    return bf16_screening.highest(x, W_enc_T, bias, k, rounding=rounding) if enabled() else None


def serves_sparse_step(x: Tensor, W_enc_T: Tensor) -> bool:
    """Whether a training step on active latents alone gives all that is needed, and may be faster."""
    return enabled() and SparseSupport.serves(x, W_enc_T)


def support_above(x: Tensor, shift: Tensor | None, W_enc_T: Tensor, cut: Tensor) -> SparseSupport | None:
    """Return the projections above a cut as the support of an objective; see `SparseSupport.above`."""
    return SparseSupport.above(x, shift, W_enc_T, cut) if serves_sparse_step(x, W_enc_T) else None
