"""Finding, among very many numbers, the few that matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..indices import true_indices

MEMBERS = 8
"""Numbers in a group, whose largest is looked at first: with so few, most groups have none that matters."""

DENSEST = 1 / 4
"""Share of groups with one that matters above which it is faster to look at all numbers at once."""


class ThresholdSearch:
    """Finds what reaches a level, in one tile after another.

    Of each group of numbers the largest is looked at first. That, and the answer, lie in memory that the next tile
    uses again: it would take longer to get it from the system than to do what is done in it.
    """

    def __init__(self) -> None:
        self._largest = self._on = torch.empty(0)

    @staticmethod
    def members(count: int) -> int:
        """Return the size of a group, given the number of values."""
        return math.gcd(MEMBERS, count)

    def largest(self, tile: Tensor) -> Tensor:
        """Return the largest number of every group, ``[groups, columns]``, to be seen until the next tile comes.

        Args:
            tile: ``[groups, members, columns]``, contiguous.
        """
        shape = (tile.shape[0], tile.shape[2])
        if self._largest.shape != shape or self._largest.dtype != tile.dtype:
            self._largest = tile.new_empty(shape)
            self._on = torch.empty(shape, dtype=torch.bool, device=tile.device)
        return torch.amax(tile, 1, out=self._largest)

    def find(self, tile: Tensor, largest: Tensor, level: Tensor) -> Tensor:
        """Return the places of what is not below a level; what is not a number is not.

        Args:
            tile: ``[groups, members, columns]``, contiguous.
            largest: what `largest` returned for it.
            level: ``[columns]``, or ``[]``.

        Returns:
            Places, counted through all axes, ``[found]`` int64; group by group, in each in no order.
        """
        _, members, columns = tile.shape
        find = true_indices(torch.lt(largest, level, out=self._on).logical_not_())
        if members == 1:
            return find
        if len(find) > DENSEST * largest.numel():
            return true_indices((tile < level).logical_not_())
        groups = find // max(columns, 1)
        if level.ndim:
            level = level.index_select(0, find - groups * columns).unsqueeze(1)
        firsts = groups.mul_((members - 1) * columns).add_(find)
        find = firsts.unsqueeze(1) + torch.arange(members, device=tile.device) * columns
        below = tile.view(-1).index_select(0, find.view(-1)).view_as(find) < level
        return find.view(-1).index_select(0, below.logical_not_().view(-1).nonzero().squeeze(1))
