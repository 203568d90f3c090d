"""Indices of the true values of a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def true_indices(mask: Tensor) -> Tensor:
    """Return the flat indices of the true values of ``mask [...]``, ascending, ``[n]`` int64.

    Most values are false, so eight at a time are tested and skipped.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8 or mask.device.type != "cpu" or flat.storage_offset() % 8:
        return flat.nonzero().squeeze(1)
    eights = flat.view(torch.int64).nonzero().squeeze(1)
    within = flat.view(-1, 8).index_select(0, eights).view(-1).nonzero().squeeze(1)
    return eights.index_select(0, within >> 3).mul_(8).add_(within.bitwise_and_(7))
