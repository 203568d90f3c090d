"""Sums as data: the terms, their scales, the order of the additions, and whether they give a recorded tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .probe import Seen

TOLERANCE = 4.0
"""How many rounding steps of its largest part, in root mean square, an inexact sum may differ by."""

Tree = int | tuple["Tree", "Tree"]
"""A binary tree of additions: leaf 0 is the block's input, leaves 1 .. n are its terms."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """One value of the residual stream as a sum of an earlier one and contributions.

        goal = sum_scale * (start_scale * start + sum of scale * term)

    A factor that the stream and all terms share is recorded as `sum_scale`: the terms are then added unscaled.

    Args:
        start: the stream before.
        terms: the contributions, in execution order.
        goal: the stream after.
        scales: the factor of each term.
        tree: the order of the additions.
        upcast: whether the sum is computed in float32 and rounded once.
        exact: whether it reproduces the goal bit for bit.
        joint: whether the terms are added to each other first and scaled together.
        start_scale: the factor of `start`, one number or one per channel ``[width]``.
        sum_scale: the factor of the whole sum, one number or one per channel ``[width]``.
        norm_input: the input of the norm whose output is `start`, where the stream continues with the norm's output;
            else None.
    """

    start: Seen
    terms: tuple[Seen, ...]
    goal: Seen
    scales: tuple[float, ...]
    tree: Tree
    upcast: bool
    exact: bool
    joint: bool = False
    start_scale: float | Tensor = 1.0
    sum_scale: float | Tensor = 1.0
    norm_input: Seen | None = None

    @property
    def factors(self) -> tuple[float | Tensor, ...]:
        """All factors."""
        return self.start_scale, self.sum_scale, *self.scales

    @property
    def plain(self) -> bool:
        """Whether the stream itself is neither scaled nor normed: ``goal = start + sum of scale * term``."""
        return self.norm_input is None and all(
            isinstance(f, float) and f == 1.0 for f in (self.start_scale, self.sum_scale)
        )

    def total(
        self,
        entry: Tensor,
        terms: Sequence[Tensor],
        node: Tree | None = None,
        given: Mapping[Tree, Tensor] | None = None,
    ) -> Tensor:
        """Sum the entry and the terms.

        Args:
            entry: ``[..., width]``.
            terms: each ``[..., width]``.
            node: return only the sum of this subtree, without `sum_scale`.
            given: values to use for subtrees instead of computing them.

        Returns:
            The sum ``[..., width]``.
        """
        factors = (self.start_scale, *((1.0,) * len(terms) if self.joint else self.scales))
        leaves = [_scaled(leaf, factor) for leaf, factor in zip((entry, *terms), factors, strict=True)]
        if self.upcast:
            leaves = [leaf.float() for leaf in leaves]
        if node is not None:
            return summed(node, leaves, given or {})
        if self.joint and not isinstance(self.tree, int):
            return leaves[0] + _scaled(summed(self.tree[1], leaves, {}), self.scales[0])
        return _scaled(summed(self.tree, leaves, given or {}), self.sum_scale)

    def node_of(self, leaves: set[int]) -> Tree | None:
        """Return the subtree that adds exactly these leaves, or None if there is none."""
        return next((node for node in nodes_of(self.tree) if set(leaves_of(node)) == leaves), None)


@dataclass(frozen=True, slots=True)
class Sums:
    """How a block computes its output: one sum, or two where the stream is normed or scaled between them.

    Args:
        stages: the sums, in execution order.
        norm_output: the output of the norm that follows the last sum, where that is the block's output; else None.
        zero_modules: paths of modules that may contribute, but whose outputs were all zero.
    """

    stages: tuple[Decomposition, ...]
    norm_output: Seen | None = None
    zero_modules: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[Seen, ...]:
        """The contributions of all stages, in execution order; they are numbered from 1."""
        return tuple(term for stage in self.stages for term in stage.terms)

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of each term."""
        return tuple(scale for stage in self.stages for scale in stage.scales)

    @property
    def plain(self) -> bool:
        """Whether the output is the input plus scaled terms, and the stream itself is neither scaled nor normed."""
        return self.norm_output is None and all(stage.plain for stage in self.stages)


def leaves_of(tree: Tree) -> Iterator[int]:
    """Yield the leaves of a tree."""
    if isinstance(tree, int):
        yield tree
    else:
        yield from leaves_of(tree[0])
        yield from leaves_of(tree[1])


def nodes_of(tree: Tree) -> Iterator[Tree]:
    """Yield a tree and all its subtrees."""
    yield tree
    if not isinstance(tree, int):
        yield from nodes_of(tree[0])
        yield from nodes_of(tree[1])


def summed(tree: Tree, leaves: Sequence[Tensor], given: Mapping[Tree, Tensor]) -> Tensor:
    """Add tensors in the order of a tree; subtrees in `given` are not computed."""
    if tree in given:
        return given[tree]
    return leaves[tree] if isinstance(tree, int) else summed(tree[0], leaves, given) + summed(tree[1], leaves, given)


def trees(leaves: tuple[int, ...]) -> Iterator[Tree]:
    """Yield all orders of the additions; the one that adds one term after another comes first."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, rest = leaves[0], leaves[1:]
    for size in range(len(rest) - 1, -1, -1):  # number of other leaves in the first leaf's subtree
        for chosen in combinations(rest, size):
            other = tuple(leaf for leaf in rest if leaf not in chosen)
            for left in trees((first, *chosen)):
                for right in trees(other):
                    yield left, right


def agrees(sums: Decomposition, total: Tensor, goal: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a sum equals its goal: bit for bit if the decomposition is exact, else within `TOLERANCE`."""
    if sums.exact:
        return torch.equal(total.to(goal.dtype), goal)
    step = max(torch.finfo(part.dtype).eps for part in (goal, *parts))
    largest = max(rms(part) for part in (goal, *parts))
    return rms(total.double() - goal.double()) <= TOLERANCE * step * largest


def rms(tensor: Tensor) -> float:
    """Return the root mean square of a tensor."""
    return float(tensor.double().square().mean().sqrt())


def _scaled(leaf: Tensor, factor: float | Tensor) -> Tensor:
    return leaf if isinstance(factor, float) and factor == 1.0 else leaf * factor
