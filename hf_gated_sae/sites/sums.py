"""Sums as data: what is added, in which order, and whether that gives a recorded result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .probe import Seen

TOLERANCE = 4.0
"""A sum that is not exact may differ by so many rounding steps of its largest part, in root mean square."""

Tree = int | tuple["Tree", "Tree"]
"""An order of summation: 0 is the block's entry, 1 .. n are its terms."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """How one value of the residual stream is summed from an earlier one.

        goal = whole * (keep * start + sum of scale * term)

    A factor that the stream and the terms have in common is `whole`: then each term is added as it is, and the sum is
    scaled, as far as numbers can tell.

    Args:
        start: the stream before.
        terms: what is added, in execution order.
        goal: the stream after.
        scales: the factor of each term.
        tree: the order of summation.
        upcast: whether the sum is taken in float32 and rounded once.
        exact: whether it reproduces the goal bit for bit.
        joint: whether the terms are summed first, and scaled as one.
        keep: the factor of the stream itself, one number or one per channel ``[width]``.
        whole: the factor of the whole sum, one number or one per channel ``[width]``.
        read: what a norm took to give `start`, where the stream goes on as the norm's output; else None.
    """

    start: Seen
    terms: tuple[Seen, ...]
    goal: Seen
    scales: tuple[float, ...]
    tree: Tree
    upcast: bool
    exact: bool
    joint: bool = False
    keep: float | Tensor = 1.0
    whole: float | Tensor = 1.0
    read: Seen | None = None

    @property
    def factors(self) -> tuple[float | Tensor, ...]:
        """All factors."""
        return self.keep, self.whole, *self.scales

    @property
    def plain(self) -> bool:
        """Whether the stream goes in as it is, neither scaled nor normed, and what comes out is the sum."""
        return self.read is None and all(isinstance(f, float) and f == 1.0 for f in (self.keep, self.whole))

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
            node: sum only what is below this node of the tree, which is not scaled as a whole.
            given: values to use for nodes in place of their sums.

        Returns:
            The sum ``[..., width]``.
        """
        factors = (self.keep, *((1.0,) * len(terms) if self.joint else self.scales))
        leaves = [_scaled(leaf, factor) for leaf, factor in zip((entry, *terms), factors, strict=True)]
        if self.upcast:
            leaves = [leaf.float() for leaf in leaves]
        if node is not None:
            return summed(node, leaves, given or {})
        if self.joint and not isinstance(self.tree, int):
            return leaves[0] + _scaled(summed(self.tree[1], leaves, {}), self.scales[0])
        return _scaled(summed(self.tree, leaves, given or {}), self.whole)

    def node_of(self, leaves: set[int]) -> Tree | None:
        """Return the partial sum of exactly these leaves, or None where none is formed."""
        return next((node for node in nodes_of(self.tree) if set(leaves_of(node)) == leaves), None)


@dataclass(frozen=True, slots=True)
class Sums:
    """How a block's output comes from its input: one sum, or two where the stream is normed or scaled in between.

    Args:
        stages: the sums, in execution order.
        closing: what a norm gave of the last sum, where that is the block's output; else None.
        silent: modules that may add something, too, and gave only zeros.
    """

    stages: tuple[Decomposition, ...]
    closing: Seen | None = None
    silent: tuple[str, ...] = ()

    @property
    def terms(self) -> tuple[Seen, ...]:
        """What is added, in execution order; terms are counted from 1 through all stages."""
        return tuple(term for stage in self.stages for term in stage.terms)

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of each term."""
        return tuple(scale for stage in self.stages for scale in stage.scales)

    @property
    def plain(self) -> bool:
        """Whether the output is the input plus the terms, with nothing done to the stream itself."""
        return self.closing is None and all(stage.plain for stage in self.stages)


def leaves_of(tree: Tree) -> Iterator[int]:
    """Yield the leaves of an order of summation."""
    if isinstance(tree, int):
        yield tree
    else:
        yield from leaves_of(tree[0])
        yield from leaves_of(tree[1])


def nodes_of(tree: Tree) -> Iterator[Tree]:
    """Yield a tree and all trees within it."""
    yield tree
    if not isinstance(tree, int):
        yield from nodes_of(tree[0])
        yield from nodes_of(tree[1])


def summed(tree: Tree, leaves: Sequence[Tensor], given: Mapping[Tree, Tensor]) -> Tensor:
    """Add tensors in the order that a tree gives."""
    if tree in given:
        return given[tree]
    return leaves[tree] if isinstance(tree, int) else summed(tree[0], leaves, given) + summed(tree[1], leaves, given)


def trees(leaves: tuple[int, ...]) -> Iterator[Tree]:
    """Yield all orders of summation; the one that adds term after term comes first."""
    if len(leaves) == 1:
        yield leaves[0]
        return
    first, rest = leaves[0], leaves[1:]
    for size in range(len(rest) - 1, -1, -1):  # how many of the rest are summed together with the first leaf
        for chosen in combinations(rest, size):
            other = tuple(leaf for leaf in rest if leaf not in chosen)
            for left in trees((first, *chosen)):
                for right in trees(other):
                    yield left, right


def agrees(sums: Decomposition, total: Tensor, goal: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a sum equals what the block gave: bit for bit if the decomposition is exact, else within tolerance."""
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
