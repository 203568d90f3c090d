"""Taking rows out of activations that are held in memory, batch after batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.cpu import ReusedMemory

BATCHES = ReusedMemory(several=2)
"""The next batch is drawn while the one before is still there."""


def take_rows(held: Tensor, rows: Tensor) -> Tensor:
    """Return some rows, in memory of their own.

    Args:
        held: ``[m, d]``.
        rows: ``[n]`` int64, on any device.

    Returns:
        ``[n, d]``, on the device of what is held, without a gradient.
    """
    if held.device.type != "cpu":
        return held.detach().index_select(0, rows.to(held.device))
    taken = BATCHES.of(held, (len(rows), held.shape[1]))
    return torch.index_select(held.detach(), 0, rows.to(held.device), out=taken)  # a third of the time of held[rows]
