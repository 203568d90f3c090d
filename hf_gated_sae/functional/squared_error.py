"""The squared error that every objective of an SAE begins with."""

from __future__ import annotations

from torch import Tensor

from . import cpu


def squared_error(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean over tokens of ``|target - reconstruction|^2``, ``[]``.

    Args:
        target: ``[..., d_out]``.
        reconstruction: ``[..., d_out]``.
    """
    fast = cpu.squared_error(target, reconstruction)
    return (target - reconstruction).square().sum(-1).mean() if fast is None else fast
