"""The pairs of token and latent that matter to an objective, and sums of rows over these alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...upstream.torch_private import pair_dots
from ..row_sums import sum_rows
from ..sparse_latents import SparseLatents
from .reused_memory import ReusedMemory

LATENTS_AT_ONCE = 1024
"""Rows of a gradient that are computed together, few enough to be still in a cache when they are copied into it."""

GRADIENTS = ReusedMemory()


class SparsePairs:
    """Pairs of a token and a latent, in the order of the latents.

    No tensor with a gradient is stored here, so that autograd functions can keep the pairs without a reference cycle.

    Args:
        tokens: of each pair ``[live]`` int64.
        latents: of each pair ``[live]`` int64, ascending.
        count: number of tokens.
        d_sae: number of latents.
    """

    def __init__(self, tokens: Tensor, latents: Tensor, count: int, d_sae: int) -> None:
        self.tokens, self.latents = tokens, latents
        self.count, self.d_sae = count, d_sae
        self._by_latent = _offsets(latents, d_sae)
        self._by_token = _offsets(tokens, count)
        self._order = tokens.to(torch.int32).argsort(stable=True)

    def dots(self, of_latents: Tensor, of_tokens: Tensor) -> Tensor:
        """Return the inner product of each pair's rows, ``[live]``.

        Args:
            of_latents: ``[d_sae, d]``.
            of_tokens: ``[count, d]``.
        """
        assert pair_dots is not None  # else no sparse step is taken
        return pair_dots(of_latents, of_tokens, self.latents, self.tokens)

    def by_latent(self, values: Tensor) -> Tensor:
        """Return the sum of each latent's values ``[live]``, ``[d_sae]``."""
        return torch.bincount(self.latents, values, minlength=self.d_sae).to(values.dtype)

    def gradient_of(self, weight: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        """Return, for each latent, the sum of its tokens' rows times its values.

        Args:
            weight: whose gradient that is, ``[d_sae, d]``.
            values: ``[live]``.
            rows: ``[count, d]``.
        """
        found, first = GRADIENTS.of(weight), 0
        ends = pairwise([*self._by_latent[:-1:LATENTS_AT_ONCE].tolist(), len(self.latents)])
        for block, (start, stop) in zip(found.split(LATENTS_AT_ONCE), ends, strict=True):
            offsets = self._by_latent[first : first + len(block) + 1] - start
            block.copy_(sum_rows(self.tokens[start:stop], offsets, values[start:stop], rows))
            first += len(block)
        return found

    def summed_by_token(self, values: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return, for each token, the sums of its latents' rows times its values.

        Args:
            values: several, ``[live]`` each.
            rows: ``[d_sae, d]``.

        Returns:
            ``[count, values, d]``.
        """
        several = len(values)
        if several == 1:
            latents, weights = (each.index_select(0, self._order) for each in (self.latents, values[0]))
            return sum_rows(latents, self._by_token, weights, rows).unsqueeze(1)
        # All sums of one token follow each other: its rows are then still in a cache.
        starts, lengths = self._by_token[:-1, None], self._by_token.diff().unsqueeze(1)
        skipped = starts * (several - 1) + lengths * torch.arange(several)
        offsets = torch.cat([(starts + skipped).view(-1), self._by_token[-1:] * several])
        total = several * len(self.latents)
        which = torch.arange(self.count * several).repeat_interleave(offsets.diff(), output_size=total)
        live = self._order.index_select(0, torch.arange(total) - skipped.view(-1).index_select(0, which))
        latents = self.latents.index_select(0, live)
        own = live.add_(which.remainder_(several), alpha=len(self.latents))
        weights = torch.cat(tuple(values)).index_select(0, own)
        return sum_rows(latents, offsets, weights, rows).view(self.count, several, -1)

    def code(self, values: Tensor, leading: Sequence[int]) -> SparseLatents:
        """Return values ``[live]`` as latents, token by token; zeros are left out.

        Args:
            values: without a gradient.
            leading: axes of the tokens, with product ``count``.
        """
        order, shape = self._order, (*leading, self.d_sae)
        values = values.index_select(0, order)
        on = values != 0
        if bool(on.all()):
            return SparseLatents(self._by_token, self.latents.index_select(0, order), values, shape)
        order = order[on]
        return SparseLatents(_offsets(self.tokens[order], self.count), self.latents[order], values[on], shape)


def _offsets(owners: Tensor, count: int) -> Tensor:
    """Return where the values of each owner begin once they are sorted, and the end, ``[count + 1]`` int64."""
    offsets = owners.new_zeros(count + 1)
    torch.cumsum(torch.bincount(owners, minlength=count), 0, out=offsets[1:])
    return offsets
