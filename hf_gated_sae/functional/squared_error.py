"""The squared error that every objective of an SAE begins with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import by_hand


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean over tokens of ``|target - reconstruction|^2``, ``[]``.

    Args:
        target: ``[..., d_out]``.
        reconstruction: ``[..., d_out]``.
    """
    wide = target.dtype == reconstruction.dtype and target.dtype in (torch.float32, torch.float64)
    if wide and target.shape == reconstruction.shape and by_hand(target, reconstruction, autocast=True):
        error: Tensor = _SquaredError.apply(target, reconstruction)
        return error
    return (target - reconstruction).square().sum(-1).mean()


class _SquaredError(torch.autograd.Function):
    """The same with one matrix of errors each way, where five would be made: most of its time is getting memory."""

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
