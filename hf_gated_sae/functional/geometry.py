"""Geometry of decoder rows and of activations."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024  # these stay in a cache; the whole matrix would be fetched again for every operation


@torch.no_grad()
def unit_norm_rows(rows: Tensor) -> Tensor:
    """Scale every row to unit L2 norm, in place; a zero row stays zero.

    Args:
        rows: decoder ``[d_sae, d_out]``.

    Returns:
        The same tensor.
    """
    for part in rows.split(_ROWS_AT_ONCE):
        norms = part.norm(dim=-1, keepdim=True)
        part.div_(norms.where(norms > 0, 1.0))
    return rows


@torch.no_grad()
def remove_parallel_component(gradient: Tensor, rows: Tensor) -> Tensor:
    """Remove, in place, the part of each row's gradient that would only change the row's length.

    Args:
        gradient: ``[d_sae, d_out]``.
        rows: decoder ``[d_sae, d_out]`` with unit-norm rows.

    Returns:
        The same gradient tensor.

    Source: Bricken et al. 2023, used by Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """
    several = _ROWS_AT_ONCE // 4  # fewer, as their gradients and products share the cache
    for part, own in zip(gradient.split(several), rows.split(several), strict=True):
        part.addcmul_((part * own).sum(dim=-1, keepdim=True), own, value=-1)
    return gradient


@torch.no_grad()
def geometric_median(x: Tensor, *, iterations: int = 100) -> Tensor:
    """Return the geometric median, the point with the least summed distance to others, by Weiszfeld's iteration.

    Args:
        x: points ``[n, d]`` with ``n >= 1``, finite.
        iterations: maximum number of iterations.

    Returns:
        ``[d]``; if all points are equal, exactly that point.
    """
    if bool((x == x[0]).all()):
        return x[0].clone()
    point = x.mean(0)
    tiny = 1e-6 * float((x - point).norm(dim=-1).mean()) + torch.finfo(x.dtype).tiny
    for _ in range(iterations):
        weights = tiny / (x - point).norm(dim=-1, keepdim=True).clamp_min(tiny)  # at most 1, so that none overflows
        moved = (weights * x).sum(0) / weights.sum()
        if float((moved - point).norm()) < tiny:
            return moved
        point = moved
    return point
