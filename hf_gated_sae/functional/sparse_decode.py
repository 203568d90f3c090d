"""Decoding from the few latents that are on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .linear import linear
from .row_sums import sum_rows, sums_rows
from .sparse_latents import SparseLatents
from .tensor_checks import is_plain

DENSEST = 1 / 16
"""Share of active latents up to which summing their rows takes less time than the dense product."""

SMALLEST = 1 << 16
"""Number of latent values below which searching for active ones does not pay."""

TOKENS_AT_ONCE = 256
"""Number of tokens whose latents are made dense at once, where many are active."""


def decode(latents: Tensor | SparseLatents, W_dec: Tensor) -> Tensor:
    """Return ``latents @ W_dec``; where few latents are active, only their decoder rows are read.

    Equal to the dense product up to the order of the sum. Where gradients or a compiler need the product, and away
    from a CPU, dense latents take the dense product.

    Args:
        latents: ``[..., d_sae]``.
        W_dec: ``[d_sae, d_out]``.

    Returns:
        ``[..., d_out]``.

    Raises:
        InputError: if active latents are of another dtype than the decoder.
    """
    if isinstance(latents, SparseLatents):
        return _decode_sparse(latents, W_dec)
    if not _few_may_be_on(latents, W_dec):
        return linear(latents, W_dec.T)
    flat = latents.reshape(-1, latents.shape[-1])
    if int(torch.count_nonzero(flat)) > DENSEST * flat.numel():
        return linear(latents, W_dec.T)
    written = _sum_active(SparseLatents.from_dense(flat), W_dec)
    return written.reshape(*latents.shape[:-1], W_dec.shape[1])


def _decode_sparse(latents: SparseLatents, W_dec: Tensor) -> Tensor:
    """Sum rows, or multiply a few tokens at a time where many latents are active.

    Raises:
        InputError: if latents and rows have different dtypes, which autocast does not make equal.
    """
    given, held = latents.values.dtype, W_dec.dtype
    # Autocast rounds the operands of a product, but not float64.
    rounds = torch.is_autocast_enabled(W_dec.device.type) and torch.float64 not in (given, held)
    if given != held and not rounds:
        raise InputError(
            f"The active latents are {given}, but the decoder is {held}: convert them with latents.to({held})."
        )
    tokens = len(latents.offsets) - 1
    if given == held and sums_rows(W_dec) and len(latents.indices) <= DENSEST * tokens * latents.d_sae:
        written = _sum_active(latents, W_dec)
    else:
        starts = range(0, max(tokens, 1), TOKENS_AT_ONCE)
        parts = [latents.rows(first, min(first + TOKENS_AT_ONCE, tokens)).dense() for first in starts]
        written = torch.cat([linear(part, W_dec.T) for part in parts])
    return written.reshape(*latents.shape[:-1], W_dec.shape[1])


def _sum_active(latents: SparseLatents, W_dec: Tensor) -> Tensor:
    """Return the weighted sums of decoder rows, ``[tokens, d_out]``."""
    return sum_rows(latents.indices, latents.offsets, latents.values, W_dec)


def _few_may_be_on(latents: Tensor, W_dec: Tensor) -> bool:
    """Whether searching for active latents may pay, and rows can be summed."""
    if latents.numel() < SMALLEST or latents.dtype != W_dec.dtype or not sums_rows(W_dec):
        return False
    return is_plain(latents, W_dec)
