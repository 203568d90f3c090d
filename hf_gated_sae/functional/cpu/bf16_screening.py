"""Screening in bfloat16: find the projections that may be above their cut, and compute only these in full precision.

Rounding changes a projection by at most ``|x^ - x| |w^| + |x| |w^ - w|``, where a hat means rounded to bfloat16. That
bound and the cut are further columns of the rounded matrices: the product of ``[x^, |x^ - x|, |x|, 1]`` and
``[w^, |w^|, |w^ - w|, -cut]`` is negative only where the exact projection is below the cut. So one pass over the
signs of the result is enough, and screening takes less than half the time of a product in float32.

Where autocast selects bfloat16 for products, the rounded product is itself compared with the cut, and used unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...upstream.torch_private import pair_dots
from ..tensor_checks import is_plain
from .features import CPU
from .reused_memory import ReusedMemory
from .threshold_search import MEMBERS, ThresholdSearch

UP = 1 + 2**-7
"""A positive number times this is no less than the number after rounding to bfloat16."""

MOST = 1e37
"""Limit above which a product is computed in float32, as bounds and sums might not be finite."""

TINY = 1e-16
"""Larger than the norm of any vector whose computed norm is 0 because the squares underflow."""

DENSEST = 1 / 32
"""Share of candidates above which computing them one by one takes longer than a product in float32."""

FEWEST_TOKENS = 384
"""Number of tokens below which rounding the weights takes more time than a product in bfloat16 saves."""

_BLOCKS_PER_KEPT = 4  # with fewer blocks their k-th highest maximum lies further below the k-th highest of all
_TOKENS_AT_ONCE = 512

ROUNDED = ReusedMemory()
"""Memory for rounded weights; that of a slice of a matrix is released with the slice."""

_AVAILABLE = CPU.bf16 and pair_dots is not None
_ZERO = torch.tensor(0, dtype=torch.int16)

BLOCK = 128
"""Number of rows whose rounding errors are computed at once, few enough to stay in a core's own cache."""


def serves(x: Tensor, weight: Tensor, cut: Tensor) -> bool:
    """Whether screening works here, and saves time: many tokens in float32, on a CPU that multiplies bfloat16."""
    if not _AVAILABLE or x.shape[0] < FEWEST_TOKENS or not x.dtype == weight.dtype == cut.dtype == torch.float32:
        return False
    return weight.stride(-1) == 1 and is_plain(x, weight, cut) and bool(torch.backends.mkldnn.enabled)


def autocast_rounds(x: Tensor) -> bool:
    """Whether autocast selects bfloat16 for products on the device of `x`."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


class Screen:
    """Estimates the projections of some tokens by a product of rounded matrices.

    Args:
        x: ``[tokens, d_in]`` float32.
    """

    def __init__(self, x: Tensor) -> None:
        """Round the tokens."""
        self.x = x
        self.rounded, self.largest = self._round(x)
        self.reaching = ThresholdSearch()

    def _round(self, x: Tensor) -> tuple[Tensor, float]:
        """Return the rounded tokens with further columns, and a bound on them: here, the largest absolute value."""
        rounded = _with_room(x, 2)
        rounded[:, :-2].copy_(x)
        rounded[:, -2:] = 1
        return rounded, _largest(rounded)

    def columns(self, weight: Tensor, bias: Tensor) -> Tensor | None:
        """Return the matrix whose product with the rounded tokens gives estimates: here, of projections plus a bias.

        Args:
            weight: ``[n, d_in]``.
            bias: ``[n]``.

        Returns:
            ``[n, columns of the tokens]`` bfloat16; None where something in the product might not be finite.
        """
        columns = ROUNDED.of(weight, (len(weight), weight.shape[1] + 2), torch.bfloat16)
        columns[:, :-2].copy_(weight)
        columns[:, -2] = bias  # in two parts: one part's rounding error would shift a latent equally at all tokens
        columns[:, -1] = bias - columns[:, -2]
        return columns if self.largest * _largest(columns) * columns.shape[1] < MOST else None

    def least(self, kth: Tensor, columns: Tensor, bias: Tensor, tokens: slice) -> Tensor:
        """Return the lowest estimate of a projection plus bias that is not below one whose estimate is `kth`.

        Args:
            kth: an estimate for each token ``[n]``.
            columns: of all latents.
            bias: of all latents ``[d_sae]``.
            tokens: the slice of the screen's tokens that `kth` is for.
        """
        return kth

    def above(self, weight: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the candidates among some latents, or None where there are too many.

        Args:
            weight: ``[n, d_in]``.
            cut: ``[n]``.

        Returns:
            Tokens, latents and projections, ``[candidates]`` each; every projection whose estimate is above its cut
            is there.
        """
        columns = self.columns(weight, -cut)
        if columns is None:
            return None
        estimates = torch.nn.functional.linear(columns, self.rounded)
        # Grouped by token, so that the results are in ascending order of latents.
        tile = estimates.view(torch.int16).unflatten(1, (ThresholdSearch.members(len(self.x)), -1))
        indices = self.reaching.find(tile, self.reaching.largest(tile), _ZERO)
        if len(indices) > DENSEST * estimates.numel():
            return None
        latents = indices // len(self.x)
        tokens = indices - latents * len(self.x)
        return tokens, latents, self.projections(estimates, indices, weight, -cut, tokens, latents)

    def projections(
        self, estimates: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, latents: Tensor
    ) -> Tensor:
        """Return some projections: here, their estimates.

        Estimates are rounded with the bias included, which loses less than rounding the projections.

        Args:
            estimates: ``[n, tokens]``.
            indices: flat indices of estimates, ``[found]``.
            weight: ``[n, d_in]``.
            bias: ``[n]``.
            tokens: token of each index ``[found]``, counted from the first one of the screen.
            latents: latent of each index ``[found]``.
        """
        return estimates.view(-1).index_select(0, indices) - bias.index_select(0, latents)


class BoundedScreen(Screen):
    """A screen whose estimates are upper bounds, so that no projection is missed.

    Args:
        x: ``[tokens, d_in]`` float32.
    """

    @property
    def summing(self) -> float:
        """Relative error of a float32 sum over all columns; twice the usual, as products may be rounded as well."""
        return 2 * self.rounded.shape[1] * 2**-24

    def _round(self, x: Tensor) -> tuple[Tensor, float]:
        rounded, lost, length = _measured(x)
        rounded[:, -3] = (lost * UP + TINY) * UP
        rounded[:, -2] = (length * UP + TINY) * UP
        rounded[:, -1] = 1
        return rounded, float(length.max()) if len(x) else 0.0

    def columns(self, weight: Tensor, bias: Tensor) -> Tensor | None:
        """Return the matrix whose product with the rounded tokens is an upper bound; see `Screen.columns`."""
        columns, lost, length = _measured(weight)
        if not bool((self.largest * length + bias.abs() < MOST).all()):
            return None
        columns[:, -3] = (length * UP + TINY) * UP  # rounding may make a vector longer
        columns[:, -2] = ((lost + self.summing * length) * UP + TINY) * UP
        columns[:, -1] = bias.abs() * (UP - 1 + self.summing) + bias
        return columns

    def least(self, kth: Tensor, columns: Tensor, bias: Tensor, tokens: slice) -> Tensor:
        """Return `kth` minus the largest difference of bounds and values; see `Screen.least`."""
        wide = columns[:, -3:-1].amax(0).float()
        slack = 2 * (self.rounded[tokens, -3:-1].float() @ wide) + 4 * bias.abs().max() * (UP - 1 + self.summing)
        return kth - slack - 4 * (UP - 1) * (kth.abs() + slack)

    def projections(
        self, estimates: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, latents: Tensor
    ) -> Tensor:
        """Return the exact projections; see `Screen.projections`."""
        assert pair_dots is not None
        return pair_dots(weight, self.x, latents, tokens)


def screen_of(x: Tensor, *, rounding: bool) -> Screen:
    """Return the screen for some tokens; with `rounding`, one that may miss projections by rounding errors."""
    return Screen(x) if rounding else BoundedScreen(x)


def highest(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, rounding: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Return the `k` highest of ``x @ weight.T + bias`` of each token without computing the others exactly.

    The product of the rounded matrices, with the bound and the bias as columns, gives upper bounds. Take the maxima of
    more than k blocks of latents: at least k upper bounds reach the k-th highest maximum. A latent that is below it by
    more than bounds and values can differ is not among the k highest.

    Args:
        x: ``[tokens, d_in]``.
        weight: ``[d_sae, d_in]``.
        bias: ``[d_sae]``.
        k: number to return per token.
        rounding: whether rounding may decide between those that are close to the k-th highest.

    Returns:
        Latents and their projections, without the bias, ``[tokens, k]`` each; None if `serves` is False, if values
        are not finite, or if too many are close to the k-th highest.
    """
    blocks = _BLOCKS_PER_KEPT * k
    screen = screen_of(x, rounding=rounding) if len(weight) >= blocks and serves(x, weight, bias) else None
    columns = None if screen is None else screen.columns(weight, bias)
    if screen is None or columns is None:
        return None
    parts, room = [], torch.empty(len(weight) * min(len(x), _TOKENS_AT_ONCE), dtype=torch.bfloat16)
    for first in range(0, len(x), _TOKENS_AT_ONCE):
        chunk = slice(first, first + _TOKENS_AT_ONCE)
        rounded = screen.rounded[chunk]
        estimates = room[: len(weight) * len(rounded)].view(len(weight), len(rounded))
        torch.mm(columns, rounded.T, out=estimates)
        least = functools.partial(screen.least, columns=columns, bias=bias, tokens=chunk)
        indices = _candidates(estimates, k, blocks, screen.reaching, least)
        if len(indices) > DENSEST * estimates.numel():
            return None
        latents = indices // estimates.shape[1]
        tokens = indices - latents * estimates.shape[1]
        projections = screen.projections(estimates, indices, weight, bias, tokens + first, latents)
        parts.append(_highest_of(tokens, latents, projections, bias, k, estimates.shape[1]))
    latents, projections = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents, projections


def _candidates(
    estimates: Tensor, k: int, blocks: int, reaching: ThresholdSearch, least: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the flat indices of estimates that may be among the `k` highest of their column, at least `k` for each.

    Args:
        estimates: ``[n, columns]`` bfloat16.
        k: number of highest values.
        blocks: minimum number of blocks whose maxima are compared.
        reaching: the search to use.
        least: maps the k-th highest maximum of each column to the lowest estimate of a candidate, ``[columns]`` each.
    """
    members = ThresholdSearch.members(len(estimates)) if len(estimates) >= MEMBERS * blocks else 1
    block = len(estimates) // (members * blocks)
    # Positive floats are in the same order as their bits read as integers, which are compared faster.
    for numbers in (estimates.view(torch.int16), estimates):
        tile = numbers.unflatten(0, (-1, members))
        largest = reaching.largest(tile)
        maxima = largest[: len(largest) // block * block].unflatten(0, (-1, block)).amax(1)
        kth = maxima.topk(k, dim=0, sorted=False).values.amin(0)
        level = least(kth.view(estimates.dtype).float()).to(estimates.dtype)
        if bool((level > 0).all()):
            break
    return reaching.find(tile, largest, level.view(numbers.dtype))


def _highest_of(
    tokens: Tensor, latents: Tensor, projections: Tensor, bias: Tensor, k: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the `k` highest candidates of each of `count` tokens, their latents and projections."""
    order = tokens.to(torch.int32).argsort(stable=True)
    counts = torch.bincount(tokens, minlength=count)
    tokens = tokens.index_select(0, order)
    within = torch.arange(len(order)) - (counts.cumsum(0) - counts)[tokens]
    table = projections.new_full((count, int(counts.max())), -torch.inf)
    table[tokens, within] = (projections + bias[latents])[order]
    candidates = order.new_zeros(table.shape)
    candidates[tokens, within] = order
    kept = candidates.gather(1, table.topk(k, sorted=False).indices)
    return latents[kept], projections[kept]


def _with_room(rows: Tensor, columns: int) -> Tensor:
    """Return an empty matrix in bfloat16 for rows ``[n, d]`` with further columns."""
    return torch.empty(len(rows), rows.shape[1] + columns, dtype=torch.bfloat16)


def _measured(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows ``[n, d]`` in bfloat16 with three empty columns, and the norms of rounding errors and of rows."""
    rounded, lost = _with_room(rows, 3), torch.empty(len(rows))
    for first in range(0, len(rows), BLOCK):
        block, own = rows[first : first + BLOCK], rounded[first : first + BLOCK, :-3]
        own.copy_(block)
        torch.linalg.vector_norm(own.float().sub_(block), dim=1, out=lost[first : first + BLOCK])
    return rounded, lost, torch.linalg.vector_norm(rows, dim=1)


def _largest(rounded: Tensor) -> float:
    """Return the largest absolute value of a matrix that is in a cache; NaN if it contains one."""
    return float(torch.stack(rounded.aminmax()).float().abs().max()) if rounded.numel() else 0.0
