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
    """How a block's output is summed.

    Args:
        terms: what is added, in execution order.
        scales: the factor of each term.
        tree: the order of summation.
        upcast: whether the sum is taken in float32 and rounded once.
        exact: whether it reproduces the output bit for bit.
    """

    terms: tuple[Seen, ...]
    scales: tuple[float, ...]
    tree: Tree
    upcast: bool
    exact: bool

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
            node: sum only what is below this node of the tree.
            given: values to use for nodes in place of their sums.

        Returns:
            The sum ``[..., width]``.
        """
        leaves = [entry, *(_scaled(term, scale) for term, scale in zip(terms, self.scales, strict=True))]
        if self.upcast:
            leaves = [leaf.float() for leaf in leaves]
        return summed(self.tree if node is None else node, leaves, given or {})

    def node_of(self, leaves: set[int]) -> Tree | None:
        """Return the partial sum of exactly these leaves, or None where none is formed."""
        return next((node for node in nodes_of(self.tree) if set(leaves_of(node)) == leaves), None)


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


def _scaled(term: Tensor, scale: float) -> Tensor:
    return term if scale == 1.0 else term * scale
