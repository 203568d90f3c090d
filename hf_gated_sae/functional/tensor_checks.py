"""Checks of tensors before a fast path is taken: whether it would lose gradients, transformations or a trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..upstream.torch_private import functorch_unwrapped, is_functorch_wrapped


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors on a CPU of which only the values are needed; see `only_values`."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and only_values(*tensors)


def only_values(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of which only the values are needed.

    An operation without derivatives may then be used: no gradient, tangent, transformation or trace is lost.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return is_ordinary(*tensors)


def by_hand(*tensors: Tensor, autocast: bool = False) -> bool:
    """Whether an operation with a first derivative of its own may be used: for ordinary tensors on a CPU.

    Args:
        *tensors: the operands.
        autocast: whether it may be used under autocast, which has no effect inside such an operation.
    """
    if not autocast and torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.device.type == "cpu" for tensor in tensors) and is_ordinary(*tensors)


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether no compiler, transformation or forward-mode derivative tracks these tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # not in its __all__
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        if is_transformed(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            return False
    return True


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transformation of `torch.func` wraps a tensor, which must then not be written into another one."""
    return is_functorch_wrapped(tensor)


def untransformed(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that transformations of `torch.func` wrap, with an axis for each `vmap`."""
    while is_transformed(tensor):
        tensor = functorch_unwrapped(tensor)
    return tensor
