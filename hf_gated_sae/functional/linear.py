"""The one large matrix product of an SAE, on the fastest path that computes it in its own precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

SMALLEST = 1 << 22
"""Multiplications below which it does not matter who does them."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``.

    On a CPU in float32 torch's own `linear` goes through BLAS, which took up to twice as long for these shapes as
    oneDNN, through which torch itself compiles this very operation. On Intel's CPUs the two are alike, but for what
    lies the other way in memory, which oneDNN copies first and BLAS reads as it is. Where gradients, `torch.func` or a
    compiler need it, or the operation is not there, `torch.nn.functional.linear` is called.

    Args:
        x: ``[..., d_in]``.
        weight: ``[n, d_in]``, of any strides.

    Returns:
        ``[..., n]``.
    """
    if _onednn_serves(x, weight):
        flat = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, None, "none", [], "")
        return flat.reshape(*x.shape[:-1], weight.shape[0])
    return nn.functional.linear(x, weight)


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
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def untransformed(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that transformations of `torch.func` look at, with an axis for each `vmap`."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the product may go through oneDNN."""
    if x.numel() * weight.shape[0] < SMALLEST or not _AVAILABLE or not x.dtype == weight.dtype == torch.float32:
        return False
    if x.numel() == x.shape[-1] and weight.stride(0) == 1:
        return False  # one token, latents side by side: BLAS reads the matrix once, on one core, and that is enough
    if _BLAS_IS_FAST and not (x.stride(-1) == weight.stride(-1) == 1):
        return False
    return is_plain(x, weight) and not torch.is_autocast_enabled("cpu") and bool(torch.backends.mkldnn.enabled)


def _available() -> bool:
    """Whether this build of torch has the operation, and it computes what it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        is_plain(x, weight)
    except (AttributeError, RuntimeError, TypeError):  # another version of torch
        return False
    return torch.equal(found, x @ weight.T)


def _blas_is_fast() -> bool:
    """Whether BLAS is Intel's, on a CPU of Intel's."""
    try:
        return torch.backends.mkl.is_available() and "intel" in torch.cpu.get_capabilities()["cpu_name"].lower()
    except (AttributeError, KeyError):  # another version of torch
        return False


_AVAILABLE = _available()
_BLAS_IS_FAST = _blas_is_fast()
