"""A training step that works on all latents."""

from __future__ import annotations

from torch import Tensor

from . import cpu
from .linear import linear
from .support import Support


class DenseSupport(Support):
    """All latents.

    Args:
        x: activations ``[..., d_in]``.
        shift: what is subtracted from them, ``[d_in]``; None for nothing.
        W_enc_T: encoder ``[d_sae, d_in]``.
    """

    latents = None

    def __init__(self, x: Tensor, shift: Tensor | None, W_enc_T: Tensor) -> None:
        self._x, self._shift = x, shift
        self.projection = self.project(W_enc_T)

    def project(self, W_enc_T: Tensor) -> Tensor:
        """Return the projections through another encoder ``[d_sae, d_in]``, ``[..., d_sae]``."""
        x, shift = self._x, self._shift
        fast = None if shift is None else cpu.project(x, shift, W_enc_T)
        return linear(x if shift is None else x - shift, W_enc_T) if fast is None else fast

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return ``values @ W_dec``, ``[..., d_out]``."""
        fast = cpu.decode(values, W_dec)
        return linear(values, W_dec.T) if fast is None else fast

    def mean_sum(self, values: Tensor) -> Tensor:
        """Return the mean over tokens of the sum over latents, ``[]``."""
        return values.sum(-1).mean()

    def code(self, values: Tensor) -> Tensor:
        """Return values as the latents of an SAE, without a gradient, ``[..., d_sae]``."""
        return values.detach()
