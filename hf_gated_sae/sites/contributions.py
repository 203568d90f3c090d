"""What each block adds to the residual stream, found by additive decomposition: exit = entry + sum of scale * term.

A decomposition is accepted when summing in some order gives the block's output bit for bit. Where the terms are
scaled by a number that only the model's code knows, the scales are fitted, and the sum may then differ by `TOLERANCE`
times the rounding step of the data type at the largest element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Seen, Trace, number_of

MOST_TERMS = 3
MOST_CANDIDATES = 40
TOLERANCE = 16.0
_SAMPLED = 256  # elements on which combinations are compared before they are summed in full

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


def decompose(chain: Chain, trace: Trace, config: Mapping[str, Any]) -> list[Decomposition | str]:
    """Decompose every block's output.

    Args:
        chain: the blocks.
        trace: one recorded forward.
        config: the model's configuration, whose numbers are tried as scales.

    Returns:
        One decomposition per block, or the reason why there is none.
    """
    numbers = sorted(set(_numbers(config)))
    found: list[Decomposition | str] = []
    hints: list[tuple[str, Decomposition]] = []
    for path, entry, leave in zip(chain.paths, chain.entries, chain.exits, strict=True):
        candidates = _candidates(trace, path, entry, leave)
        known = (_transfer(path, hint, trace, candidates, entry, leave) for hint in hints)
        result = next((item for item in known if item is not None), None)
        if result is None:
            result = _search(trace, candidates, entry, leave, numbers)
            if result is not None:
                hints.append((path, result))
        found.append(result or f"the output of {path} is not its input plus outputs of modules in it")
    return found


def _candidates(trace: Trace, path: str, entry: Seen, leave: Seen) -> list[Seen]:
    """Return one place per distinct tensor that a module in the block gives: the one closest to the addition."""
    last: dict[str, Seen] = {}
    for seen in trace.within(path, "output"):
        usable = seen.is_tokens and seen.place.width == entry.place.width
        if not usable or seen.value in (entry.value, leave.value) or not trace.values[seen.value].any():
            continue
        if seen.value not in last or seen.place.order > last[seen.value].place.order:
            last[seen.value] = seen
    return sorted(last.values(), key=lambda seen: seen.place.order)


def _transfer(
    path: str, hint: tuple[str, Decomposition], trace: Trace, candidates: list[Seen], entry: Seen, leave: Seen
) -> Decomposition | None:
    """Try an earlier block's decomposition on the modules of the same names."""
    origin, known = hint
    by_path = {seen.place.path: seen for seen in candidates}
    terms = [by_path.get(path + term.place.path[len(origin) :]) for term in known.terms]
    present = tuple(term for term in terms if term is not None)
    if len(present) != len(terms) or not known.exact:
        return None
    moved = Decomposition(present, known.scales, known.tree, known.upcast, exact=True)
    return moved if _reproduces(moved, trace, entry, leave) else None


def holds(sums: Decomposition, trace: Trace, entry: Seen, leave: Seen) -> bool:
    """Whether a decomposition gives the block's output within the tolerance."""
    goal = trace.values[leave.value]
    terms = [trace.values[term.value].reshape(goal.shape) for term in sums.terms]
    before = trace.values[entry.value].reshape(goal.shape)
    return agrees(sums, sums.total(before, terms), goal, [before, *terms])


def agrees(sums: Decomposition, total: Tensor, goal: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a sum equals what the block gave: bit for bit if the decomposition is exact, else within tolerance."""
    if sums.exact:
        return torch.equal(total.to(goal.dtype), goal)
    step = max(torch.finfo(part.dtype).eps for part in (goal, *parts))
    largest = max(float(part.abs().max()) for part in (goal, *parts))
    return bool((total.double() - goal.double()).abs().max() <= TOLERANCE * step * largest)


def _reproduces(sums: Decomposition, trace: Trace, entry: Seen, leave: Seen) -> bool:
    shape = trace.values[leave.value].shape
    terms = [trace.values[term.value].reshape(shape) for term in sums.terms]
    total = sums.total(trace.values[entry.value].reshape(shape), terms)
    return number_of(total.to(trace.values[leave.value].dtype)) == leave.value


def _search(
    trace: Trace, candidates: list[Seen], entry: Seen, leave: Seen, numbers: list[float]
) -> Decomposition | None:
    """Look for at most three candidates that explain what the block adds: as they are, then scaled."""
    candidates = candidates[-MOST_CANDIDATES:]
    if not candidates:
        return None
    goal = trace.values[leave.value]
    picks = torch.randperm(goal.numel(), generator=torch.Generator().manual_seed(0))[:_SAMPLED]
    before, after = (trace.values[seen.value].reshape(-1)[picks].double() for seen in (entry, leave))
    columns = torch.stack([trace.values[seen.value].reshape(-1)[picks].double() for seen in candidates])
    largest = max(float(item.abs().max()) for item in (before, after, columns))
    step = max(torch.finfo(trace.values[seen.value].dtype).eps for seen in (entry, leave, *candidates))
    slack = TOLERANCE * step * largest
    for scaled in (False, True):
        for count in range(1, min(MOST_TERMS, len(candidates)) + 1):
            for chosen, scales in _close(columns, after - before, count, slack, scaled):
                terms = tuple(candidates[index] for index in chosen)
                result = _settle(trace, terms, scales, entry, leave, numbers if scaled else [])
                if result.exact or (scaled and holds(result, trace, entry, leave)):
                    return result
    return None


def _close(
    columns: Tensor, wanted: Tensor, count: int, slack: float, scaled: bool
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Yield the rows of `columns` ``[n, m]`` whose (scaled) sum is within `slack` of `wanted` ``[m]``."""
    picks = torch.combinations(torch.arange(len(columns)), count)
    rows = columns[picks]
    scales = torch.ones(len(picks), count, dtype=columns.dtype)
    if scaled:
        sizes = rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        unit = rows / sizes
        solved, _ = torch.linalg.solve_ex(unit @ unit.mT, (unit @ wanted).unsqueeze(-1))
        scales = (solved / sizes).squeeze(-1)
    errors = ((rows * scales.unsqueeze(-1)).sum(dim=1) - wanted).abs().amax(dim=-1)
    usable = (errors <= slack) & (scales.abs() > 1e-4).all(dim=-1)
    for index in torch.argsort(errors).tolist():
        if not usable[index]:
            continue
        yield tuple(picks[index].tolist()), tuple(scales[index].tolist())


def _settle(
    trace: Trace, terms: tuple[Seen, ...], scales: tuple[float, ...], entry: Seen, leave: Seen, numbers: list[float]
) -> Decomposition:
    """Find the order of summation, and the scales' true values, that reproduce the output bit for bit.

    Returns:
        An exact decomposition, else one with the fitted scales, marked as not exact.
    """
    snapped = tuple(_nearest(scale, numbers) for scale in scales)
    orders = list(trees(tuple(range(len(terms) + 1))))
    for tried in dict.fromkeys((snapped, scales)):
        for upcast in (False, True):
            for tree in orders:
                sums = Decomposition(terms, tried, tree, upcast, exact=True)
                if _reproduces(sums, trace, entry, leave):
                    return sums
    return Decomposition(terms, scales, orders[0], False, exact=False)


def _nearest(scale: float, numbers: list[float]) -> float:
    """Return the number of the configuration that a fitted scale stands for, or the scale."""
    close = [number for number in (1.0, *numbers) if abs(number - scale) <= 4e-3 * abs(scale)]
    return min(close, key=lambda number: abs(number - scale)) if close else scale


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    """Yield every fractional number of a configuration."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, float):
            yield value


def _scaled(term: Tensor, scale: float) -> Tensor:
    return term if scale == 1.0 else term * scale
