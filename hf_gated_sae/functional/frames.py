"""Per-token normalisations that SAEs were trained behind, and how they are undone.

Each is an affine change of frame, ``normalised = (x - shift) / scale``, with a shift and a scale that depend on the
token; what the decoder writes is brought back as ``written * scale + shift``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


class Frame(NamedTuple):
    """Shift and scale of every token, both ``[..., 1]``."""

    shift: Tensor
    scale: Tensor

    def enter(self, x: Tensor) -> Tensor:
        """Return ``(x - shift) / scale``."""
        return (x - self.shift) / self.scale

    def leave(self, written: Tensor) -> Tensor:
        """Return ``written * scale + shift``."""
        return written * self.scale + self.shift


def center(x: Tensor, eps: float) -> Frame:
    """Subtract each token's mean: the residual stream of a TransformerLens model with centred writing weights."""
    mean = x.mean(-1, keepdim=True)
    return Frame(mean, torch.ones_like(mean))


def layer_norm(x: Tensor, eps: float) -> Frame:
    """Subtract the mean, divide by the unbiased standard deviation plus 1e-5 (OpenAI's and SAELens's layer norm)."""
    mean = x.mean(-1, keepdim=True)
    return Frame(mean, (x - mean).std(-1, keepdim=True) + LAYER_NORM_EPS)


def unit_norm(x: Tensor, eps: float) -> Frame:
    """Bring each token to the norm ``sqrt(d_in)`` (SAELens's ``constant_norm_rescale``)."""
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return Frame(torch.zeros_like(scale), scale)


def rms_norm(x: Tensor, eps: float) -> Frame:
    """Divide by the root mean square: what a model's RMS norm gives before its gain."""
    scale = (x.float().square().mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)
    return Frame(torch.zeros_like(scale), scale)


FRAMES: Mapping[str, Callable[[Tensor, float], Frame]] = {
    frame.__name__: frame for frame in (center, layer_norm, unit_norm, rms_norm)
}
"""Normalisations by name; ``"none"`` is not among them."""
