"""Decoding from the few latents that are on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import is_plain, linear

DENSEST = 1 / 16
"""Share of latents that are on up to which summing their rows takes less time than the dense product."""

SMALLEST = 1 << 16
"""Number of latent values below which looking for those that are on does not pay."""


EXACT = (torch.float32, torch.float64)
"""Dtypes in which rows are summed as exactly as the product sums them; halves would be rounded at every step."""


def decode(latents: Tensor, W_dec: Tensor) -> Tensor:
    """Return ``latents @ W_dec``, reading only decoder rows of latents that are on where they are few.

    Equal to the dense product up to the order of the sum. Where gradients or a compiler need the product, and away
    from a CPU, the dense product is computed.

    Args:
        latents: ``[..., d_sae]``.
        W_dec: ``[d_sae, d_out]``.

    Returns:
        ``[..., d_out]``.
    """
    if not _few_may_be_on(latents, W_dec):
        return linear(latents, W_dec.T)
    flat = latents.reshape(-1, latents.shape[-1])
    if int(torch.count_nonzero(flat)) > DENSEST * flat.numel():
        return linear(latents, W_dec.T)
    tokens, live = flat.nonzero(as_tuple=True)
    counts = torch.bincount(tokens, minlength=len(flat))
    starts = counts.cumsum(0) - counts
    written = nn.functional.embedding_bag(live, W_dec, starts, mode="sum", per_sample_weights=flat[tokens, live])
    return written.reshape(*latents.shape[:-1], W_dec.shape[1])


def _few_may_be_on(latents: Tensor, W_dec: Tensor) -> bool:
    """Whether it is worth looking, and rows can be summed."""
    if latents.numel() < SMALLEST or latents.dtype != W_dec.dtype or latents.dtype not in EXACT:
        return False
    return W_dec.is_contiguous() and is_plain(latents, W_dec)
