"""What may be done with tensors: whether gradients, transformations or a compiler would be lost on the way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..upstream.torch_private import functorch_unwrapped, is_functorch_wrapped


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors on a CPU from which nothing but values is wanted; see `only_values`."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and only_values(*tensors)


def only_values(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors from which nothing but values is wanted.

    An operation without derivatives may serve them: no gradient, tangent, transformation or trace would be lost.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return is_ordinary(*tensors)


def by_hand(*tensors: Tensor, autocast: bool = False) -> bool:
    """Whether an operation that brings its own first derivative may serve these: ordinary tensors on a CPU.

    Args:
        *tensors: the operands.
        autocast: whether it may where autocast is on, which does not reach into such an operation.
    """
    if not autocast and torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" for tensor in tensors) and is_ordinary(*tensors)


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether no compiler, transformation or forward derivative looks at these tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # not in its __all__
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        if is_transformed(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            return False
    return True


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transformation of `torch.func` looks at a tensor, which may then not be written elsewhere."""
    return is_functorch_wrapped(tensor)


def untransformed(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that transformations of `torch.func` look at, with an axis for each `vmap`."""
    while is_transformed(tensor):
        tensor = functorch_unwrapped(tensor)
    return tensor
