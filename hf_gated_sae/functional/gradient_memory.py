"""Memory for the gradients of large matrices, used again at the next step.

Memory of that size goes back to the system when a gradient is let go of, and comes again page by page, each of them
cleared: more work than the sums that are written into it where few latents are on. So it is kept for as long as the
weights live, and given out again once nobody can see the gradient in it any more, whoever it was that held it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_kept: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


def memory_for(weight: Tensor) -> Tensor:
    """Return memory for a gradient, whatever is in it; autograd can take it as it is.

    Args:
        weight: contiguous, on a CPU.

    Returns:
        As large as the weight, of its dtype; seen by nobody else.
    """
    kept = _kept.get(weight)
    if kept is None or (kept.shape, kept.dtype) != (weight.shape, weight.dtype):
        kept = torch.empty(weight.shape, dtype=weight.dtype)
        if _ALONE is not None:
            _kept[weight] = kept
    elif not _is_unseen(kept):  # the gradient is still there: parts of a batch are added up
        return torch.empty(weight.shape, dtype=weight.dtype)
    return kept.detach()


def forget(weights: Iterable[Tensor]) -> None:
    """Let go of the memory that is kept for some weights."""
    for weight in weights:
        _kept.pop(weight, None)


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
