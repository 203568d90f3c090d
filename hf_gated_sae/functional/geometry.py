"""Geometry of decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def unit_norm_rows(rows: Tensor) -> Tensor:
    """Scale every row to unit L2 norm, in place; a zero row stays zero.

    Args:
        rows: decoder ``[d_sae, d_out]``.

    Returns:
        The same tensor.
    """
    norms = rows.norm(dim=-1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, torch.ones_like(norms)))


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
    along = (gradient * rows).sum(dim=-1, keepdim=True)
    return gradient.sub_(along * rows)
