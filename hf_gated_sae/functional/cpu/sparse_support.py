"""A training step that works on exactly the latents that matter to the objective.

Its gradients are the same sums as those of `DenseSupport` without the terms that are zero; nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...upstream.torch_private import pair_dots
from ..indices import true_indices
from ..sparse_latents import SparseLatents
from ..support import Support
from ..tensor_checks import by_hand
from .bf16_screening import autocast_rounds
from .products import multiply
from .sparse_pairs import SparsePairs
from .tiled_projection import above

DENSEST = 1 / 16
"""Share of active latents above which a dense training step is faster."""

SAMPLE = 64, 1024
"""Tokens and latents on which the share of active latents is estimated."""

FEWEST = 1 << 20
"""Number of projections below which a sparse step saves no time."""


class SparseSupport(Support):
    """Some latents of some tokens, in the order of the latents, and for each of these in the order of the tokens.

    Args:
        x: activations ``[..., d_in]``.
        shift: what is subtracted from them, ``[d_in]``; None for nothing.
        W_enc_T: encoder ``[d_sae, d_in]``.
        tokens: the token of each projection, counted through all leading axes, ``[live]`` int64.
        latents: the latent of each projection ``[live]`` int64.
        projections: their values ``[live]``; computed if not given.
        centred: ``x - shift``, ``[tokens, d_in]``; computed if not given.
    """

    latents: Tensor

    def __init__(
        self,
        x: Tensor,
        shift: Tensor | None,
        W_enc_T: Tensor,
        tokens: Tensor,
        latents: Tensor,
        projections: Tensor | None = None,
        centred: Tensor | None = None,
    ) -> None:
        self._leading = x.shape[:-1]
        if bool((latents.diff() < 0).any()):
            order = latents.to(torch.int32).argsort(stable=True)
            tokens, latents = tokens[order], latents[order]
            projections = None if projections is None else projections[order]
        self._pairs, self.latents = SparsePairs(tokens, latents, math.prod(self._leading), len(W_enc_T)), latents
        self._x, self._shift = x.reshape(-1, x.shape[-1]), shift
        with torch.no_grad():
            self._centred = _centred(self._x, shift) if centred is None else centred
        self.projection = self.project(W_enc_T, projections)

    def project(self, W_enc_T: Tensor, projections: Tensor | None = None) -> Tensor:
        """Return the projections through another encoder ``[d_sae, d_in]``, ``[live]``; their values may be given."""
        if projections is None:
            with torch.no_grad():
                projections = self._pairs.dots(W_enc_T, self._centred)
        projection: Tensor = _SparseProjection.apply(
            self._x, self._shift, W_enc_T, self._centred, projections, self._pairs
        )
        return projection

    @classmethod
    def above(cls, x: Tensor, shift: Tensor | None, W_enc_T: Tensor, cut: Tensor) -> SparseSupport | None:
        """Return the projections above a cut.

        Args:
            x: activations ``[..., d_in]``.
            shift: what is subtracted from them, ``[d_in]``; None for nothing.
            W_enc_T: encoder ``[d_sae, d_in]``.
            cut: ``[d_sae]``; projections at or below it do not affect the objective.

        Returns:
            None where a dense step is faster, or needed for its derivatives.
        """
        if not cls.serves(x, W_enc_T):
            return None
        rounding = autocast_rounds(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            centred = _centred(x.reshape(-1, x.shape[-1]), shift)
            if _sampled_share(centred, W_enc_T, cut) > DENSEST:
                return None
            found = above(centred, W_enc_T, cut, most=2 * DENSEST, rounding=rounding)
            if found is None:
                return None
            tokens, latents, projections = found
            on = true_indices((projections <= cut.index_select(0, latents)).logical_not_())
            if len(on) < len(projections):  # candidates that are not above the cut are dropped
                tokens, latents, projections = (each.index_select(0, on) for each in found)
        return cls(x, shift, W_enc_T, tokens, latents, projections, centred)

    @staticmethod
    def serves(x: Tensor, W_enc_T: Tensor) -> bool:
        """Whether a sparse step gives all that is needed, and may be faster: in full precision on a CPU."""
        wide = x.dtype == W_enc_T.dtype and x.dtype in (torch.float32, torch.float64)
        many = math.prod(x.shape[:-1]) * len(W_enc_T) >= FEWEST
        return (
            pair_dots is not None and wide and many and W_enc_T.is_contiguous() and by_hand(x, W_enc_T, autocast=True)
        )

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return ``values @ W_dec``, ``[..., d_out]``."""
        [decoded] = self.decode_each([values], W_dec, [False])
        return decoded

    def decode_each(self, values: Sequence[Tensor], W_dec: Tensor, frozen: Sequence[bool]) -> Sequence[Tensor]:
        """Decode several values, reading each row of the decoder once; see `Support.decode_each`."""
        with torch.no_grad():
            written = self._pairs.summed_by_token(values, W_dec)
        decoded: list[Tensor] = []
        for each, still, own in zip(values, frozen, written.unbind(1), strict=True):
            decoded.append(_SparseDecoded.apply(each, W_dec.detach() if still else W_dec, own, self._pairs))
        return [each.reshape(*self._leading, W_dec.shape[1]) for each in decoded]

    def mean_sum(self, values: Tensor) -> Tensor:
        """Return the mean over tokens of the sum over latents, ``[]``."""
        return values.sum() / self._pairs.count

    def code(self, values: Tensor) -> SparseLatents:
        """Return values as the latents of an SAE, without a gradient; zeros are left out."""
        return self._pairs.code(values.detach(), self._leading)


class _SparseProjection(torch.autograd.Function):
    """``(x - shift) @ W_enc`` with values that were computed already, and the gradient of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        W_enc_T: Tensor,
        centred: Tensor,
        projections: Tensor,
        pairs: SparsePairs,
    ) -> Tensor:
        ctx.save_for_backward(W_enc_T, centred)
        ctx.pairs = pairs
        return projections.view_as(projections)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc_T, centred = ctx.saved_tensors
        pairs: SparsePairs = ctx.pairs
        grad_x = pairs.summed_by_token([grad], W_enc_T).squeeze(1) if ctx.needs_input_grad[0] else None
        grad_shift = -(pairs.by_latent(grad) @ W_enc_T) if ctx.needs_input_grad[1] else None
        grad_weight = pairs.gradient_of(W_enc_T, grad, centred) if ctx.needs_input_grad[2] else None
        return grad_x, grad_shift, grad_weight, None, None, None


class _SparseDecoded(torch.autograd.Function):
    """``values @ W_dec`` for the values of a few latents, computed already, and the gradient of it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, written: Tensor, pairs: SparsePairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return written.view_as(written)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        pairs: SparsePairs = ctx.pairs
        grad = grad.contiguous()
        grad_values = pairs.dots(W_dec, grad) if ctx.needs_input_grad[0] else None
        grad_W_dec = pairs.gradient_of(W_dec, values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, None, None


def _centred(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``x - shift``."""
    return x if shift is None else x - shift


def _sampled_share(centred: Tensor, W_enc_T: Tensor, cut: Tensor) -> float:
    """Estimate the share of projections above their cut from a sample, which costs less than a search in vain."""
    both = zip((centred, W_enc_T), SAMPLE, strict=True)
    tokens, latents = (slice(None, None, max(1, len(each) // few)) for each, few in both)  # most are never read
    projections = multiply(centred[tokens], W_enc_T[latents].contiguous())
    return int((projections > cut[latents]).sum()) / max(1, projections.numel())
