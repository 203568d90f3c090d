"""Dense products on a CPU: through oneDNN, and with gradients that take no more products than needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...upstream.torch_private import onednn_linear
from ..tensor_checks import by_hand, is_plain
from .features import CPU

SMALLEST = 1 << 22
"""Number of multiplications below which both libraries take the same time."""


def linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return ``x @ weight.T`` computed by oneDNN; None where that is impossible or not faster.

    In float32 torch's own `linear` calls BLAS, which took up to twice as long for these shapes as oneDNN, which torch
    uses when it compiles this operation. On Intel CPUs both take the same time, except that oneDNN first copies a
    matrix of other strides, which BLAS reads in place.
    """
    if not _onednn_serves(x, weight):
        return None
    assert onednn_linear is not None
    return onednn_linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, by oneDNN where that is faster."""
    fast = linear(x, weight)
    return nn.functional.linear(x, weight) if fast is None else fast


def project(x: Tensor, shift: Tensor, weight: Tensor) -> Tensor | None:
    """Return ``(x - shift) @ weight.T``, whose gradient for `shift` takes no further product of matrices.

    None where derivatives of that gradient, a transformation or a compiler may need the plain operations.
    """
    if not by_hand(x, shift, weight):
        return None
    projection: Tensor = _Projection.apply(x, shift, weight)
    return projection


def decode(values: Tensor, W_dec: Tensor) -> Tensor | None:
    """Return ``values @ W_dec``, whose gradients also use oneDNN; None as for `project`."""
    if not by_hand(values, W_dec):
        return None
    decoded: Tensor = _Decoded.apply(values, W_dec)
    return decoded


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor | None:
    """Return the mean over tokens of the squared error, with one matrix of errors in each direction instead of five.

    The plain operations spend most of their time on allocating memory. None where they are needed.
    """
    wide = target.dtype == reconstruction.dtype and target.dtype in (torch.float32, torch.float64)
    if not (wide and target.shape == reconstruction.shape and by_hand(target, reconstruction, autocast=True)):
        return None
    error: Tensor = _SquaredError.apply(target, reconstruction)
    return error


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether to compute the product by oneDNN."""
    if x.numel() * weight.shape[0] < SMALLEST or onednn_linear is None or not x.dtype == weight.dtype == torch.float32:
        return False
    if x.numel() == x.shape[-1] and weight.stride(0) == 1:
        return False  # one token, latents side by side: BLAS reads the matrix once, on one core, and that is enough
    if CPU.intel_blas and not (x.stride(-1) == weight.stride(-1) == 1):
        return False
    return is_plain(x, weight) and not torch.is_autocast_enabled("cpu") and bool(torch.backends.mkldnn.enabled)


class _Projection(torch.autograd.Function):
    """``(x - shift) @ W_enc``; the gradient of the shift takes no further product of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, W_enc_T: Tensor) -> Tensor:
        centred = x - shift
        ctx.save_for_backward(centred, W_enc_T)
        return multiply(centred, W_enc_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc_T = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = multiply(grad, W_enc_T.T) if ctx.needs_input_grad[0] else None
        grad_shift = -(flat.sum(0) @ W_enc_T) if ctx.needs_input_grad[1] else None
        wanted = ctx.needs_input_grad[2]
        return grad_x, grad_shift, multiply(flat.T, centred.reshape(-1, centred.shape[-1]).T) if wanted else None


class _Decoded(torch.autograd.Function):
    """``values @ W_dec``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        return multiply(values, W_dec.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad_values = multiply(grad, W_dec) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_values, None
        flat = grad.reshape(-1, grad.shape[-1])
        return grad_values, multiply(values.reshape(-1, values.shape[-1]).T, flat.T)


class _SquaredError(torch.autograd.Function):
    """The squared error with one matrix of errors in each direction."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, reconstruction: Tensor) -> Tensor:
        error = target - reconstruction
        ctx.save_for_backward(error)
        return torch.linalg.vector_norm(error, dim=-1).square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        [error] = ctx.saved_tensors
        per_token = 2 * grad / max(1, error.shape[:-1].numel())
        to_target, to_reconstruction = ctx.needs_input_grad
        return (error * per_token if to_target else None), (error * -per_token if to_reconstruction else None)
