"""Weighted sums of matrix rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sums_rows(W_dec: Tensor) -> bool:
    """Whether rows of this matrix can be summed as exactly as in a matrix product."""
    if W_dec.dtype in (torch.float32, torch.float64):
        return W_dec.is_contiguous()
    return W_dec.dtype in _SUMMED_IN_FLOAT32 and W_dec.device.type == "cpu" and W_dec.is_contiguous()


def sum_rows(indices: Tensor, offsets: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Return weighted sums of some rows.

    Args:
        indices: rows to sum, one sum after the other, ``[n]`` int64.
        offsets: start of each sum in `indices`, and the end, ``[sums + 1]`` int64.
        weights: weight of each row in its sum, ``[n]``.
        rows: ``[m, d]``.

    Returns:
        ``[sums, d]``.
    """
    return nn.functional.embedding_bag(
        indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _summed_in_float32() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes whose rows this build of torch sums in float32; in others it rounds at every step."""
    ones, bag = torch.arange(2000) % 7, torch.tensor([0])
    return frozenset(
        dtype
        for dtype in (torch.bfloat16, torch.float16)
        if nn.functional.embedding_bag(
            ones, torch.ones(7, 64, dtype=dtype), bag, mode="sum", per_sample_weights=torch.ones(2000, dtype=dtype)
        )
        .eq(torch.tensor(2000, dtype=dtype))
        .all()
    )


_SUMMED_IN_FLOAT32 = _summed_in_float32()
