"""Find the projections above a cut tile by tile, so that ``[tokens, d_sae]`` never exists."""

from __future__ import annotations

import torch
from torch import Tensor

from . import bf16_screening
from .products import multiply
from .threshold_search import ThresholdSearch

FEW = 64
"""Number of tokens up to which a product with strided weights is faster than copying the weights first."""

TILE = 1 << 21
"""Number of projections computed at once, few enough that their memory stays in a cache and is reused there."""


def above(
    x: Tensor, weight: Tensor, cut: Tensor, *, most: float = 1.0, rounding: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return all projections ``x @ weight.T`` that are above a cut, and perhaps some that are not.

    A NaN projection is above every cut, and every projection is above a NaN cut.

    Args:
        x: ``[tokens, d_in]``.
        weight: ``[d_sae, d_in]``.
        cut: ``[d_sae]``.
        most: share of the projections above which to give up.
        rounding: whether rounding to bfloat16 may decide where a projection is close to its cut.

    Returns:
        Tokens, latents and projections, ``[found]`` each, in no order of tokens but ascending latents for each; None
        if there are more than `most`.
    """
    tokens, d_sae = x.shape[0], weight.shape[0]
    screened = bf16_screening.screen_of(x, rounding=rounding) if bf16_screening.serves(x, weight, cut) else None
    # A screen's estimates are half as wide, so that twice as many fit the same cache.
    width = max(1, TILE * (1 if screened is None else 2) // max(tokens, 1))
    reaching = ThresholdSearch()
    parts, left = [], most * tokens * d_sae
    for first in range(0, d_sae, width):
        rows, cuts = weight[first : first + width], cut[first : first + width]
        found = screened.above(rows, cuts) if screened is not None else None
        if found is None:
            screened = None  # if one tile is dense, or not finite, others will be as well
            found = _multiplied(x, rows, cuts, reaching)
        left -= len(found[0])
        if left < 0:
            return None
        parts.append((found[0], found[1] + first, found[2]))
    if not parts:
        nothing = torch.empty(0, dtype=torch.int64, device=x.device)
        return nothing, nothing, x.new_empty(0)
    token, latent, projection = (torch.cat(column) for column in zip(*parts, strict=True))
    return token, latent, projection


def _multiplied(x: Tensor, weight: Tensor, cut: Tensor, reaching: ThresholdSearch) -> tuple[Tensor, Tensor, Tensor]:
    """Search one tile by computing all of it."""
    # The same product as in encoding, so that both results have the same bits. Transposed weights, as mapped from a
    # file, are read in place for few tokens, and copied for many.
    projections = multiply(x, weight if weight.stride(-1) == 1 or len(x) <= FEW else weight.contiguous())
    members = ThresholdSearch.members(len(x))
    tile = projections.reshape(len(x) // members, members, len(weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    level = cut.to(wide).nextafter(cut.new_full((), torch.inf, dtype=wide))
    places = reaching.find(tile, reaching.largest(tile), level)
    tokens = places // max(len(weight), 1)
    return tokens, places - tokens * len(weight), projections.reshape(-1)[places]
