"""Selecting rows of activations in memory, batch after batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.cpu import ReusedMemory

BATCHES = ReusedMemory(several=2)
"""Memory of two batches: the next one is drawn while the previous one is still in use."""


def take_rows(held: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of some rows.

    Args:
        held: ``[m, d]``.
        rows: indices ``[n]`` int64, on any device.

    Returns:
        ``[n, d]``, on the device of `held`, without a gradient.
    """
    if held.device.type != "cpu":
        return held.detach().index_select(0, rows.to(held.device))
    taken = BATCHES.of(held, (len(rows), held.shape[1]))
    return torch.index_select(held.detach(), 0, rows.to(held.device), out=taken)  # a third of the time of held[rows]
