"""The matrix products of an SAE."""

from __future__ import annotations

from torch import Tensor, nn

from . import cpu
from .cpu import products


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, ``[..., n]``.

    Args:
        x: ``[..., d_in]``.
        weight: ``[n, d_in]``, of any strides.
    """
    fast = cpu.linear(x, weight) if x.numel() * weight.shape[0] >= products.SMALLEST else None
    return nn.functional.linear(x, weight) if fast is None else fast
