"""Per-token normalisations that SAEs were trained behind, and how they are undone.

Each is affine, ``normalised = (x - shift) / divisor``, with a shift and a divisor that depend on the token. The
decoder's output is transformed back as ``written * scale + shift``. Scale and divisor differ only by the small number
that keeps the division finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


class TokenNormalization(NamedTuple):
    """Shift, divisor and scale of every token, each ``[..., 1]``."""

    shift: Tensor
    divisor: Tensor
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return ``(x - shift) / divisor``."""
        return (x - self.shift) / self.divisor

    def undo(self, written: Tensor) -> Tensor:
        """Return ``written * scale + shift``."""
        return written * self.scale + self.shift


def center(x: Tensor, eps: float) -> TokenNormalization:
    """Subtract each token's mean, as in the residual stream of TransformerLens models with centred writing weights."""
    mean = x.mean(-1, keepdim=True)
    one = torch.ones_like(mean)
    return TokenNormalization(mean, one, one)


def layer_norm(x: Tensor, eps: float) -> TokenNormalization:
    """Subtract the mean, divide by the unbiased standard deviation plus 1e-5; undone without the 1e-5.

    Source: OpenAI's sparse_autoencoder, and SAELens.
    """
    mean = x.mean(-1, keepdim=True)
    deviation = (x - mean).std(-1, keepdim=True)
    return TokenNormalization(mean, deviation + LAYER_NORM_EPS, deviation)


def unit_norm(x: Tensor, eps: float) -> TokenNormalization:
    """Scale each token to the norm ``sqrt(d_in)`` (SAELens's ``constant_norm_rescale``)."""
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    scale = scale.clamp_min(torch.finfo(x.dtype).tiny)  # a token of zeros stays one
    return TokenNormalization(torch.zeros_like(scale), scale, scale)


def rms_norm(x: Tensor, eps: float) -> TokenNormalization:
    """Divide by the root mean square: a model's RMS norm before its gain."""
    scale = (_wide(x).square().mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)
    return TokenNormalization(torch.zeros_like(scale), scale, scale)


def standardize(x: Tensor, eps: float) -> TokenNormalization:
    """Subtract the mean, divide by the biased standard deviation: a model's layer norm before gain and bias."""
    mean = _wide(x).mean(-1, keepdim=True)
    scale = ((_wide(x) - mean).square().mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)
    return TokenNormalization(mean.to(x.dtype), scale, scale)


def _wide(x: Tensor) -> Tensor:
    """Return the activations in float32 or wider, in which models compute their norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


NORMALIZATIONS: Mapping[str, Callable[[Tensor, float], TokenNormalization]] = {
    each.__name__: each for each in (center, layer_norm, unit_norm, rms_norm, standardize)
}
"""Normalisations by name; ``"none"`` is not among them."""
