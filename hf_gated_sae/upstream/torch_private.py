"""Private names of torch, seen in 2.9 and 2.13.

Operations that exist for speed (`onednn_linear`, `pair_dots`, `storage_holders`) are None where this build of torch
lacks them or computes something else; callers then take the public way. The others are needed to know which forward
is running: without them hooks could edit the wrong call, so a missing one raises, at the latest when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------- operations for speed


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` by oneDNN, ``[n, d] -> [n, m]``; torch's own `linear` uses BLAS in float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _pair_dots(rows: Tensor, others: Tensor, row: Tensor, other: Tensor) -> Tensor:
    """Return ``rows[row] . others[other]`` of each pair, ``[pairs]``.

    It is the gradient of `embedding_bag` with respect to its weights, which torch offers under no public name.

    Args:
        rows: ``[n, d]``.
        others: ``[m, d]``.
        row: of each pair ``[pairs]`` int64; in ascending order each row is read once.
        other: of each pair ``[pairs]`` int64.
    """
    counts = torch.bincount(row, minlength=len(rows))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, others, other, counts.cumsum(0) - counts, row, 0
    )


def _storage_holders(tensor: Tensor) -> tuple[int, int]:
    """Return the number of references to a tensor's memory: to its storage object in Python, and from tensors."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def _checked_onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    x, weight = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
    try:
        return _onednn_linear if torch.equal(_onednn_linear(x, weight), x @ weight.T) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def _checked_pair_dots() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    rows, others = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
    row, other = torch.tensor([0, 0, 1]), torch.tensor([3, 1, 2])
    try:
        found = _pair_dots(rows, others, row, other)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return _pair_dots if torch.equal(found, (rows @ others.T)[row, other]) else None


def _checked_storage_holders() -> Callable[[Tensor], tuple[int, int]] | None:
    tensor = torch.empty(4)
    try:
        alone = _storage_holders(tensor)
        for see in (Tensor.detach, lambda each: each[1:], Tensor.untyped_storage):
            other = see(tensor)
            if _storage_holders(tensor) == alone:
                return None
            del other
        return _storage_holders if _storage_holders(tensor) == alone else None
    except (AttributeError, TypeError, RuntimeError):
        return None


onednn_linear = _checked_onednn_linear()
pair_dots = _checked_pair_dots()
storage_holders = _checked_storage_holders()

# ---------------------------------------------------------------- transformations of torch.func


is_functorch_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a transformation of `torch.func` wraps a tensor, which must then not be written into another one."""

functorch_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
"""Returns the tensor that a transformation of `torch.func` wraps."""


# ---------------------------------------------------------------- which forward runs

MODULE_CALL: CodeType = nn.Module._call_impl.__code__
"""The code of a module's call. torch runs no hook after a call that KeyboardInterrupt ended, so the stack is inspected
to see whether the call is still running."""


next_node_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""Returns the number of the next autograd node of this thread."""

current_backward: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the backward() that runs in this thread; -1 if none does."""


def current_node_number() -> int | None:
    """Return the number of the autograd node for which backward() runs now in this thread; None outside of one."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called on this module."""
    return module._compiled_call_impl is not None


# ---------------------------------------------------------------- processes


def default_store() -> Any:
    """Return the key-value store by which the processes of the default group found each other.

    Ranks meet there with a time limit; every public collective waits for ranks that never come.
    """
    return torch.distributed.distributed_c10d._get_default_store()
