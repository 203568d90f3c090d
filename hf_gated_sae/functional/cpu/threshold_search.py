"""Search among very many values for the few that reach a level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..indices import true_indices

MEMBERS = 8
"""Values in a group, of which the largest is tested first; groups are small, so that most have none that matters."""

DENSEST = 1 / 4
"""Share of groups with a value that matters above which it is faster to test all values at once."""


class ThresholdSearch:
    """Finds the values that reach a level, in one tile after another.

    The largest value of each group is tested first. These values and the results of the test are in memory that the
    next tile uses again, as allocating it would take longer than the test.
    """

    def __init__(self) -> None:
        self._largest = self._on = torch.empty(0)

    @staticmethod
    def members(count: int) -> int:
        """Return the size of a group, given the number of values."""
        return math.gcd(MEMBERS, count)

    def largest(self, tile: Tensor) -> Tensor:
        """Return the largest value of every group, ``[groups, columns]``, valid until the next call.

        Args:
            tile: ``[groups, members, columns]``, contiguous.
        """
        shape = (tile.shape[0], tile.shape[2])
        if self._largest.shape != shape or self._largest.dtype != tile.dtype:
            self._largest = tile.new_empty(shape)
            self._on = torch.empty(shape, dtype=torch.bool, device=tile.device)
        return torch.amax(tile, 1, out=self._largest)

    def find(self, tile: Tensor, largest: Tensor, level: Tensor) -> Tensor:
        """Return the flat indices of the values that are not below a level; NaN is not below any.

        Args:
            tile: ``[groups, members, columns]``, contiguous.
            largest: what `largest` returned for it.
            level: ``[columns]``, or ``[]``.

        Returns:
            Flat indices ``[found]`` int64, group by group, in no order within a group.
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
