"""Large memory that is needed at every step: gradients, rounded weights, batches.

Memory of that size goes back to the system when nobody holds it any more, and comes again page by page, each of them
cleared: more work than what is written into it where few latents are on. So it is kept for as long as that lives which
it belongs to, and given out again once nobody can see what is in it any more, whoever it was that held it.
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
        several: how much of it is kept for each tensor: as many as are in use at a time.
    """

    def __init__(self, several: int = 1) -> None:
        self.several = several
        self.kept: MutableMapping[Tensor, list[Tensor]] = WeakTensorKeyDictionary()
        _PURPOSES.append(self)

    def of(self, owner: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory on the CPU; autograd can take it as a gradient without a copy.

        Args:
            owner: what it belongs to.
            shape: of what is to be written; the owner's by default.
            dtype: likewise.

        Returns:
            A contiguous tensor, seen by nobody else.
        """
        shape, dtype = owner.shape if shape is None else torch.Size(shape), dtype or owner.dtype
        with _ONE_AT_A_TIME, torch.inference_mode(False):  # in that mode, nobody could write to it any more later
            kept = [each for each in self.kept.get(owner, ()) if (each.shape, each.dtype) == (shape, dtype)]
            for each in kept:
                if _is_unseen(each):
                    return each.detach()
            fresh = torch.empty(shape, dtype=dtype)
            if _ALONE is None or len(kept) == self.several:  # all of it is in use: parts of a batch are added up, say
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
    """Whether this tensor object is all that there is to its memory: no view, no detached tensor, no array."""
    return storage_holders is not None and storage_holders(tensor) == _ALONE


_ALONE = None if storage_holders is None else storage_holders(torch.empty(4))
