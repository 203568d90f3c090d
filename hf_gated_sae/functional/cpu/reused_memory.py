"""Large memory that is needed at every step: gradients, rounded weights, batches.

Memory of that size goes back to the system when nobody holds it any more, and comes again page by page, each of them
cleared: more work than what is written into it where few latents are on. So it is kept for as long as that lives which
it belongs to, and given out again once nobody can see what is in it any more, whoever it was that held it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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
        """Return memory on the CPU, whatever is in it; autograd can take it as a gradient as it is.

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
    """Let go of all memory that is kept for some tensors."""
    for owner in owners:
        for purpose in _PURPOSES:
            purpose.kept.pop(owner, None)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """Return how many hold a tensor's memory: as a storage object, and as tensors; torch has no public name for it."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def _is_unseen(tensor: Tensor) -> bool:
    """Whether this tensor object is all that there is to its memory: no view, no detached tensor, no array."""
    return _holders(tensor) == _ALONE


def _alone() -> tuple[int, int] | None:
    """Return what `_holders` says of a tensor that nobody else sees; None if this build of torch does not tell."""
    tensor = torch.empty(4)
    try:
        alone = _holders(tensor)
        for see in (Tensor.detach, lambda each: each[1:], Tensor.untyped_storage):
            other = see(tensor)
            if _holders(tensor) == alone:
                return None
            del other
        return alone if _holders(tensor) == alone else None
    except (AttributeError, TypeError, RuntimeError):  # another version of torch
        return None


_ALONE = _alone()
