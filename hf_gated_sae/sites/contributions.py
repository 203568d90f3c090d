"""What each block adds to the residual stream, found by additive decomposition: exit = entry + sum of scale * term.

A decomposition is accepted when summing in some order gives the block's output bit for bit. Where the terms are scaled
by a number that is not in the configuration, the scales are fitted by least squares; that is accepted when the sum is
within `TOLERANCE` rounding steps, far below what the block adds, and no other choice of terms comes near.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Seen, Trace, number_of
from .sums import TOLERANCE, Decomposition, rms, trees

MOST_TERMS = 3
MOST_CANDIDATES = 40
_SAMPLED = 256  # elements on which combinations are compared before they are summed in full
_TRIED = 32  # combinations that are summed, best first
_NEAR = 0.2  # a number of the configuration this close to a fitted scale is tried in its place
_APART = 4.0  # a fitted sum must be so many times better than the next choice of terms

Choice = tuple[float, tuple[int, ...], tuple[float, ...]]
"""Root mean square error, which candidates, and their scales."""


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's entry, exit and candidates, with their values at the sampled elements in their own types."""

    trace: Trace
    path: str
    entry: Seen
    leave: Seen
    candidates: list[Seen]

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' places relative to the block."""
        return tuple(str(seen.place)[len(self.path) :] for seen in self.candidates)

    def sample(self, seen: Seen) -> Tensor:
        """Return a tensor's values at the sampled elements ``[m]``."""
        flat = self.trace.values[seen.value].reshape(-1)
        return flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[:_SAMPLED]]

    def reproduces(self, sums: Decomposition) -> bool:
        """Whether a decomposition gives the block's output bit for bit; most wrong ones fail on the sample."""
        goal = self.trace.values[self.leave.value]
        total = sums.total(self.sample(self.entry), [self.sample(term) for term in sums.terms])
        if not torch.equal(total.to(goal.dtype), self.sample(self.leave)):
            return False
        terms = [self.trace.values[term.value].reshape(goal.shape) for term in sums.terms]
        total = sums.total(self.trace.values[self.entry.value].reshape(goal.shape), terms)
        return number_of(total.to(goal.dtype)) == self.leave.value


def decompose(chain: Chain, trace: Trace, config: Mapping[str, Any]) -> list[Decomposition | str]:
    """Decompose every block's output.

    Args:
        chain: the blocks.
        trace: one recorded forward.
        config: the model's configuration, whose numbers are tried as scales.

    Returns:
        One decomposition per block, or the reason why there is none.
    """
    numbers = sorted({1.0, *_numbers(config)})
    found: list[Decomposition | str] = []
    hints: list[tuple[str, Decomposition]] = []
    hopeless: set[tuple[str, ...]] = set()
    for path, entry, leave in zip(chain.paths, chain.entries, chain.exits, strict=True):
        block = _Block(trace, path, entry, leave, _candidates(trace, path, entry, leave))
        known = (_transfer(block, *hint) for hint in hints)
        result = next((item for item in known if item is not None), None)
        if result is None and block.names not in hopeless:
            result = _search(block, numbers)
            if result is not None:
                hints.append((path, result))
            else:
                hopeless.add(block.names)
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
    return sorted(last.values(), key=lambda seen: seen.place.order)[-MOST_CANDIDATES:]


def _transfer(block: _Block, origin: str, known: Decomposition) -> Decomposition | None:
    """Try an earlier block's decomposition on the modules of the same names."""
    by_path = {seen.place.path: seen for seen in block.candidates}
    terms = [by_path.get(block.path + term.place.path[len(origin) :]) for term in known.terms]
    present = tuple(term for term in terms if term is not None)
    if len(present) != len(terms) or not known.exact:
        return None
    moved = Decomposition(present, known.scales, known.tree, known.upcast, exact=True)
    return moved if block.reproduces(moved) else None


def _search(block: _Block, numbers: Sequence[float]) -> Decomposition | None:
    """Look for at most three candidates that explain what the block adds: as they are, then scaled."""
    if not block.candidates:
        return None
    counts = range(1, min(MOST_TERMS, len(block.candidates)) + 1)
    before, after = block.sample(block.entry).double(), block.sample(block.leave).double()
    columns = torch.stack([block.sample(seen).double() for seen in block.candidates])
    step = max(torch.finfo(block.sample(seen).dtype).eps for seen in (block.entry, block.leave, *block.candidates))
    slack = TOLERANCE * step * max(rms(before), rms(after), *(rms(column) for column in columns))
    for scaled in (False, True):
        for count in counts:
            for error, chosen, scales in _ranked(columns, after - before, count, scaled)[:_TRIED]:
                terms = tuple(block.candidates[index] for index in chosen)
                exact = _exact(block, terms, scales, numbers if scaled else ()) if error <= slack else None
                if exact is not None:
                    return exact
    for count in counts:
        best, *others = _ranked(columns, after - before, count, scaled=True)[:2]
        clear = best[0] <= slack <= rms(after - before) / _APART**2
        if clear and all(other[0] >= _APART * best[0] for other in others):
            terms = tuple(block.candidates[index] for index in best[1])
            return Decomposition(terms, best[2], next(trees(tuple(range(count + 1)))), upcast=False, exact=False)
    return None


def _ranked(columns: Tensor, wanted: Tensor, count: int, scaled: bool) -> list[Choice]:
    """Return the choices of `count` rows of `columns` ``[n, m]``, by how well their sum gives `wanted` ``[m]``."""
    picks = torch.combinations(torch.arange(len(columns)), count)
    rows = columns[picks]
    scales = torch.ones(len(picks), count, dtype=columns.dtype)
    if scaled:
        sizes = rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        unit = rows / sizes
        solved, _ = torch.linalg.solve_ex(unit @ unit.mT, (unit @ wanted).unsqueeze(-1))
        scales = (solved / sizes).squeeze(-1)
    errors = ((rows * scales.unsqueeze(-1)).sum(dim=1) - wanted).square().mean(dim=-1).sqrt()
    errors = torch.where((scales.abs() > 1e-4).all(dim=-1), errors, torch.inf).nan_to_num(torch.inf)
    best = torch.argsort(errors)[: _TRIED + 1]
    listed = zip(errors[best].tolist(), picks[best].tolist(), scales[best].tolist(), strict=True)
    return [(error, tuple(chosen), tuple(factors)) for error, chosen, factors in listed]


def _exact(
    block: _Block, terms: tuple[Seen, ...], scales: tuple[float, ...], numbers: Sequence[float]
) -> Decomposition | None:
    """Find the order of summation, and the scales' true values, that reproduce the output bit for bit."""
    orders = list(trees(tuple(range(len(terms) + 1))))
    for factors in product(*(_options(scale, numbers) for scale in scales)):
        for upcast in (False, True):
            for tree in orders:
                sums = Decomposition(terms, factors, tree, upcast, exact=True)
                if block.reproduces(sums):
                    return sums
    return None


def _options(scale: float, numbers: Sequence[float]) -> list[float]:
    """Return the numbers of the configuration that a fitted scale may stand for, closest first, then the scale."""
    near = (number for number in numbers if abs(number - scale) <= _NEAR * abs(scale))
    return [*sorted(near, key=lambda number: abs(number - scale))[:MOST_TERMS], scale]


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    """Yield every fractional number of a configuration."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, float):
            yield value
