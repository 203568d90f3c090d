"""Activation functions that turn pre-latents into latents, with the gradients that training needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .tensor_checks import is_ordinary


class _JumpReLU(torch.autograd.Function):
    """``relu(z) * [z > threshold]`` with a straight-through gradient for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre_latents: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_latents, threshold)
        ctx.bandwidth = bandwidth
        return _above(pre_latents, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        pre_latents, threshold = ctx.saved_tensors
        live = (pre_latents > threshold) & (pre_latents > 0)
        if not ctx.needs_input_grad[1]:
            return grad * live, None, None
        inside = _window(pre_latents, threshold, ctx.bandwidth)
        grad_threshold = torch.where(inside, -(threshold / ctx.bandwidth), 0.0) * grad
        return grad * live, _sum_to(grad_threshold, threshold), None


class _AboveThreshold(torch.autograd.Function):
    """``[z > threshold]`` with a straight-through gradient for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre_latents: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_latents, threshold)
        ctx.bandwidth = bandwidth
        return (pre_latents > threshold).to(pre_latents.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre_latents, threshold = ctx.saved_tensors
        grad_threshold = -(1.0 / ctx.bandwidth) * _window(pre_latents, threshold, ctx.bandwidth) * grad
        return None, _sum_to(grad_threshold, threshold), None


def _above(pre_latents: Tensor, threshold: Tensor) -> Tensor:
    """Return ``relu(z) * [z > threshold]`` without a gradient for the threshold."""
    # Computed in the pre-latents' own dtype; the comparison promotes to the wider of the two.
    return torch.relu(pre_latents) * (pre_latents > threshold)


def _window(pre_latents: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return which pre-latents are inside the kernel around their threshold."""
    return (pre_latents - threshold).abs() < bandwidth / 2


def _estimate(slope: Tensor | float, pre_latents: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return zeros, in the shape of the pre-latents, with derivative `slope` in the threshold inside the kernel.

    Uses only operations that every transformation supports, which takes more passes over the pre-latents than the
    `backward` of the classes above.
    """
    window = _window(pre_latents.detach(), threshold.detach(), bandwidth)
    # For an infinite threshold the slope is infinite and the difference is NaN.
    moved = torch.where(window, threshold - threshold.detach(), 0.0)
    return (torch.where(window, slope, 0.0) * moved).to(pre_latents.dtype)


def _sum_to(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Sum a broadcast gradient back to the shape of its parameter."""
    return gradient.sum_to_size(parameter.shape).to(parameter.dtype)


def jumprelu(pre_latents: Tensor, threshold: Tensor, *, bandwidth: float = 1e-3) -> Tensor:
    r"""Return ``relu(z) * [z > threshold]``; the comparison is strict.

    The gradient with respect to the threshold is the straight-through estimate
    ``-(threshold / bandwidth) * rectangle((z - threshold) / bandwidth)``, also under `torch.func`, forward-mode
    derivatives and compilers.

    Args:
        pre_latents: ``[..., d_sae]``.
        threshold: ``[d_sae]`` or a scalar; float32 is recommended whatever the dtype of the pre-latents.
        bandwidth: width of the rectangle kernel, in units of the pre-latents.

    Returns:
        Latents ``[..., d_sae]`` in the dtype of the pre-latents.

    Source: Rajamanoharan et al. 2024b (arXiv 2407.14435), section 3.
    """
    if not is_ordinary(pre_latents, threshold):
        slope = -(threshold.detach() / bandwidth)
        return _above(pre_latents, threshold) + _estimate(slope, pre_latents, threshold, bandwidth)
    result: Tensor = _JumpReLU.apply(pre_latents, threshold, bandwidth)
    return result


def above_threshold(pre_latents: Tensor, threshold: Tensor, *, bandwidth: float = 1e-3) -> Tensor:
    """Return ``[z > threshold]``, differentiable in the threshold; its sum over latents is L0.

    Args:
        pre_latents: ``[..., d_sae]``; receives no gradient.
        threshold: ``[d_sae]`` or a scalar.
        bandwidth: width of the rectangle kernel, in units of the pre-latents.

    Returns:
        Zeros and ones ``[..., d_sae]``.

    Source: Rajamanoharan et al. 2024b (arXiv 2407.14435), section 3.
    """
    if not is_ordinary(pre_latents, threshold):
        on = (pre_latents > threshold).to(pre_latents.dtype)
        return on + _estimate(-1.0 / bandwidth, pre_latents, threshold, bandwidth)
    result: Tensor = _AboveThreshold.apply(pre_latents, threshold, bandwidth)
    return result


def topk(pre_latents: Tensor, k: int, *, rectified: bool = True, weights: Tensor | None = None) -> Tensor:
    """Keep the `k` largest pre-latents of each token, after a ReLU.

    Args:
        pre_latents: ``[..., d_sae]``.
        k: number to keep, ``1 <= k <= d_sae``.
        rectified: whether there is a ReLU; without one negative values are kept where fewer than `k` are positive.
        weights: ``[d_sae]``; if given, the latents with the largest ``value * weight`` are kept, at their own value.

    Returns:
        Latents ``[..., d_sae]``; with the ReLU fewer than `k` are non-zero where fewer are positive.

    Raises:
        InputError: if `k` is out of range.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.

    >>> topk(torch.tensor([[3.0, -1.0, 2.0, 1.0]]), 2)
    tensor([[3., 0., 2., 0.]])
    """
    return scattered(*topk_indices(pre_latents, k, rectified=rectified, weights=weights), pre_latents.shape[-1])


def topk_indices(
    pre_latents: Tensor, k: int, *, rectified: bool = True, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the indices and values of the latents that `topk` keeps, ``[..., k]`` each; arguments as for `topk`."""
    if not 1 <= k <= pre_latents.shape[-1]:
        raise InputError(f"k is {k}, expected 1 .. d_sae = {pre_latents.shape[-1]}.")
    values = torch.relu(pre_latents) if rectified else pre_latents
    ranked = values if weights is None else values * weights
    indices = ranked.topk(k, dim=-1, sorted=False).indices
    return indices, values.gather(-1, indices)


def scattered(indices: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """Return latents ``[..., d_sae]`` that have given values ``[..., k]`` at given indices, and are 0 elsewhere."""
    return values.new_zeros(*values.shape[:-1], d_sae).scatter(-1, indices, values)


def largest(pre_latents: Tensor, count: int) -> Tensor:
    """Keep the `count` largest pre-latents of a tensor, after a ReLU.

    Args:
        pre_latents: any shape.
        count: number to keep; all if there are fewer.

    Returns:
        Latents of the same shape.
    """
    flat = torch.relu(pre_latents).reshape(-1)
    values, indices = flat.topk(min(count, flat.numel()), sorted=False)
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_latents)


def lowest_projection(threshold: Tensor, bias: Tensor) -> Tensor:
    """Return a cut: a projection at or below it stays at or below the threshold when the bias is added.

    This holds however the sum is rounded, in the dtype of the bias or a wider one.

    Args:
        threshold: ``[d_sae]`` or a scalar, not negative.
        bias: ``[d_sae]``.

    Returns:
        ``threshold - bias`` minus a margin, ``[d_sae]`` in the dtype of the bias.
    """
    margin = 4 * torch.finfo(bias.dtype).eps
    wide = torch.promote_types(bias.dtype, torch.float32)
    threshold, bias_wide = threshold.to(wide), bias.to(wide)
    return (threshold - bias_wide - margin * (threshold.abs() + bias_wide.abs())).to(bias.dtype)
