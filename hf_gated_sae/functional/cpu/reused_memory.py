"""Reuse of large memory that is needed at every step: gradients, rounded weights, batches.

Memory of that size is returned to the system when it is freed, and is allocated again page by page, each page cleared.
Where few latents are active, that takes longer than writing the values. So it is kept for as long as its owner exists,
and handed out again once no other object refers to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...upstream.torch_private import storage_holders


class ReusedMemory:
    """Memory for one purpose.

    Args:
        several: number of buffers kept for each owner: as many as are in use at a time.
    """

    def __init__(self, several: int = 1) -> None:
        self.several = several
        self.kept: MutableMapping[Tensor, list[Tensor]] = WeakTensorKeyDictionary()
        _PURPOSES.append(self)

    def of(self, owner: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory on the CPU; autograd can take it as a gradient without a copy.

        Args:
            owner: the tensor for which the memory is kept.
            shape: of the result; the owner's by default.
            dtype: of the result; the owner's by default.

        Returns:
            A contiguous tensor whose memory no other object uses.
        """
        shape, dtype = owner.shape if shape is None else torch.Size(shape), dtype or owner.dtype
        with _ONE_AT_A_TIME, torch.inference_mode(False):  # an inference tensor could not be written to later
            kept = [each for each in self.kept.get(owner, ()) if (each.shape, each.dtype) == (shape, dtype)]
            for each in kept:
                if _is_unseen(each):
                    return each.detach()
            fresh = torch.empty(shape, dtype=dtype)
            if _ALONE is None or len(kept) == self.several:  # all in use, such as when gradients are accumulated
                return fresh
            self.kept[owner] = [*kept, fresh]
            return fresh.detach()


_PURPOSES: list[ReusedMemory] = []
_ONE_AT_A_TIME = threading.Lock()


def forget(owners: Iterable[Tensor]) -> None:
    """Release all memory that is held for some tensors."""
    for owner in owners:
        for purpose in _PURPOSES:
            purpose.kept.pop(owner, None)


def _is_unseen(tensor: Tensor) -> bool:
    """Whether nothing but this tensor object refers to its memory: no view, no detached tensor, no array."""
    return storage_holders is not None and storage_holders(tensor) == _ALONE


_ALONE = None if storage_holders is None else storage_holders(torch.empty(4))
