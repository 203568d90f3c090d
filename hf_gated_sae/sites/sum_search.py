"""Find which of the tensors in a block explain the step from one value of the residual stream to a later one.

    goal = whole * (keep * start + sum of scale * term)

A sum is accepted when adding in some order gives the goal bit for bit. Where a factor is a number that is not in the
configuration, the factors are fitted by least squares; that is accepted when the sum is within `TOLERANCE` rounding
steps at every element, far below what is added, no other choice of terms comes near, and no further one adds to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .probe import Seen, Trace, number_of
from .sums import TOLERANCE, Decomposition, rms, trees

MOST_TERMS = 3
_SAMPLED = 256  # elements on which combinations are compared before they are summed in full
_TRIED = 32  # combinations that are summed, best first
_NEAR = 0.2  # a number of the configuration this close to a fitted scale is tried in its place
_KEPT = 0.01  # a stream that goes on at all keeps at least this share of itself
_SAME = 1.05  # a known number replaces a fitted one if the error grows by less than this
_DROPS = 0.95  # of the error is what chance alone leaves at least, when one more tensor may explain it
_APART = 4.0  # a fitted sum must be so many times better than the next choice of terms

Choice = tuple[float, tuple[int, ...], tuple[float, ...]]
"""Root mean square error, which candidates, and their scales."""


@dataclass(frozen=True, slots=True)
class Step:
    """The step to explain, and the tensors that may explain it."""

    trace: Trace
    start: Seen
    goal: Seen
    candidates: list[Seen]

    def sample(self, seen: Seen) -> Tensor:
        """Return a tensor's values at the sampled elements ``[m]``, in its own type."""
        return self.trace.values[seen.value].reshape(-1)[self._where()]

    def spread(self, vector: Tensor) -> Tensor:
        """Return one value per channel ``[width]`` at the sampled elements ``[m]``."""
        return vector[self._where() % self.goal.place.width]

    def _where(self) -> Tensor:
        elements = self.trace.values[self.goal.value].numel()
        return torch.randperm(elements, generator=torch.Generator().manual_seed(0))[:_SAMPLED]

    def reproduces(self, sums: Decomposition) -> bool:
        """Whether a decomposition gives the goal bit for bit; most wrong ones fail on the sample."""
        goal = self.trace.values[self.goal.value]
        keep, whole = (self.spread(f) if isinstance(f, Tensor) else f for f in (sums.keep, sums.whole))
        sampled = dataclasses.replace(sums, keep=keep, whole=whole)
        total = sampled.total(self.sample(self.start), [self.sample(term) for term in sums.terms])
        if not torch.equal(total.to(goal.dtype), self.sample(self.goal)):
            return False
        terms = [self.trace.values[term.value].reshape(goal.shape) for term in sums.terms]
        total = sums.total(self.trace.values[self.start.value].reshape(goal.shape), terms)
        return number_of(total.to(goal.dtype)) == self.goal.value


def find_sum(
    step: Step, numbers: Sequence[float], exactly: bool, counts: Sequence[int] = range(1, MOST_TERMS + 1)
) -> Decomposition | None:
    """Look for terms that explain what is added to the unchanged stream: as they are, then scaled.

    Args:
        step: the step.
        numbers: the configuration's numbers, which are tried as scales.
        exactly: whether only sums that reproduce the goal bit for bit count, or only others.
        counts: how many terms to try.
    """
    counts = [count for count in counts if count <= len(step.candidates)]
    if not counts:
        return None
    before, after, columns, slack = _sampled(step)
    for scaled in (False, True) if exactly else ():
        for count in counts:
            for error, chosen, scales in _ranked(columns, after - before, count, scaled)[:_TRIED]:
                options = [_options(scale, numbers if scaled else ()) for scale in scales]
                exact = _exact(step, chosen, options) if error <= slack else None
                if exact is not None:
                    return exact
    for count in counts if not exactly else ():
        best = _clear(_ranked(columns, after - before, count, scaled=True), slack, rms(after - before))
        found = None if best is None else _rounded(step, best[1], 1.0, best[2], numbers)
        if found is not None:
            return found
    return None


def find_kept_sum(
    step: Step, numbers: Sequence[float], vectors: Sequence[Tensor], exactly: bool, counts: Sequence[int]
) -> Decomposition | None:
    """Look for a sum in which the stream itself is scaled, before or after the addition, by a vector or by a number.

    Args:
        step: the step.
        numbers: the configuration's numbers, which are tried as factors.
        vectors: the block's own vectors ``[width]``.
        exactly: whether only sums that reproduce the goal bit for bit count, or only others.
        counts: how many terms to try.
    """
    counts = [count for count in counts if count <= len(step.candidates)]
    if not counts:
        return None
    before, after, columns, slack = _sampled(step)
    for vector, count in product(vectors if exactly else (), counts):
        by = step.spread(vector).double()
        for whole in (True, False):
            ranked = _ranked(columns * by if whole else columns, after - by * before, count, scaled=False)
            for error, chosen, _ in ranked[:_TRIED]:
                keep, scale = ([1.0], [vector]) if whole else ([vector], [1.0])
                exact = _exact(step, chosen, [[1.0]] * count, keep, scale) if error <= slack else None
                if exact is not None:
                    return exact
    both = torch.cat([before.unsqueeze(0), columns])
    for count in counts:
        ranked = [c for c in _ranked(both, after, count + 1, scaled=True) if c[1][0] == 0 and abs(c[2][0]) > _KEPT]
        for error, (_, *picked), factors in ranked[:_TRIED] if exactly else ():
            chosen = tuple(index - 1 for index in picked)
            exact = _exact_scaled(step, chosen, factors, numbers) if error <= slack else None
            if exact is not None:
                return exact
        best = None if exactly else _clear(ranked, slack, rms(after))
        terms = () if best is None else tuple(index - 1 for index in best[1][1:])
        found = None if best is None else _rounded(step, terms, best[2][0], best[2][1:], numbers)
        if found is not None:
            return found
    return None


def _exact_scaled(
    step: Step, chosen: tuple[int, ...], factors: tuple[float, ...], numbers: Sequence[float]
) -> Decomposition | None:
    """Find out where the factors of a fitted sum stand, so that it reproduces the goal bit for bit.

    One factor of all is one of the whole sum. By powers of two that is the same as one of each part, so that the order
    decides: terms as they are, then terms with known factors, then with any.
    """
    keep, *scales = factors
    one = [[1.0]] * len(chosen)
    wholes, known = _options(keep, numbers), [_options(factor, numbers)[:-1] for factor in factors]
    found = _exact(step, chosen, one, wholes=wholes) if all(_is_near(scale, keep) for scale in scales) else None
    found = found or _exact(step, chosen, known[1:], known[0])
    found = found or _exact(step, chosen, [_options(scale / keep, numbers) for scale in scales], wholes=wholes)
    return found or _exact(step, chosen, [_options(scale, numbers) for scale in scales], wholes)


def _sampled(step: Step) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return start, goal and candidates at the sampled elements in double precision, and the error to allow."""
    before, after = step.sample(step.start).double(), step.sample(step.goal).double()
    columns = torch.stack([step.sample(seen).double() for seen in step.candidates])
    step_size = max(torch.finfo(step.sample(seen).dtype).eps for seen in (step.start, step.goal, *step.candidates))
    return before, after, columns, TOLERANCE * step_size * max(rms(row) for row in (before, after, *columns))


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


def _clear(ranked: Sequence[Choice], slack: float, size: float) -> Choice | None:
    """Return the best choice if it is within rounding, what it explains is far above that, and no other is near."""
    if not ranked:
        return None
    best, *others = ranked[:2]
    clear = best[0] <= slack <= size / _APART**2
    return best if clear and all(other[0] >= _APART * best[0] for other in others) else None


def _rounded(
    step: Step, chosen: tuple[int, ...], keep: float, scales: tuple[float, ...], numbers: Sequence[float]
) -> Decomposition | None:
    """Return a sum with fitted factors if it is within rounding at every element, and no further term improves it.

    Known numbers take the place of fitted ones where they explain the goal as well.
    """
    values = step.trace.values
    shape = values[step.goal.value].shape
    before, after = (values[seen.value].reshape(shape).double() for seen in (step.start, step.goal))
    terms = [values[step.candidates[index].value].reshape(shape).double() for index in chosen]
    fitted = (keep, *scales)

    def rest(factors: Sequence[float]) -> Tensor:
        return after - sum((part * factor for part, factor in zip((before, *terms), factors, strict=True)), 0 * after)

    allowed = _SAME * rms(rest(fitted))
    kept = [1.0] if keep == 1.0 else _options(keep, numbers)
    joint = [(w,) * len(fitted) for w in kept if keep != 1.0 and all(_is_near(scale, keep) for scale in scales)]
    tried = (*joint, *product(kept, *(_options(scale, numbers) for scale in scales)))
    factors = next((known for known in tried if rms(rest(known)) <= allowed), fitted)
    left = rest(factors)
    parts = torch.stack([after, *(part * factor for part, factor in zip((before, *terms), factors, strict=True))])
    used = [step.start, step.goal, *(step.candidates[index] for index in chosen)]
    rounding = max(torch.finfo(values[seen.value].dtype).eps for seen in used)
    if bool((left.abs() > TOLERANCE * rounding * parts.abs().amax(0)).any()):
        return None
    others = [seen for number, seen in enumerate(step.candidates) if number not in chosen]
    for seen in others:
        basis = torch.stack([*(part.flatten() for part in terms), values[seen.value].flatten().double()], dim=-1)
        solved = torch.linalg.lstsq(basis, left.reshape(-1, 1)).solution
        if rms(left.reshape(-1, 1) - basis @ solved) < _DROPS * rms(left):
            return None  # a contribution is missing that is as small as the rounding
    if len(set(factors)) == 1:  # one of all is one of the whole sum
        return _made(step, chosen, 1.0, (1.0,) * len(chosen), exact=False, whole=factors[0])
    return _made(step, chosen, factors[0], tuple(factors[1:]), exact=False)


def _exact(
    step: Step,
    chosen: tuple[int, ...],
    options: Sequence[Sequence[float]],
    keeps: Sequence[float | Tensor] = (1.0,),
    wholes: Sequence[float | Tensor] = (1.0,),
) -> Decomposition | None:
    """Find the order of summation, and the factors' true values, that reproduce the goal bit for bit."""
    for whole, keep, factors in product(wholes, keeps, product(*options)):
        first = _made(step, chosen, keep, factors, exact=True, whole=whole)
        for upcast in (False, True):
            for tree in trees(tuple(range(len(chosen) + 1))):
                sums = dataclasses.replace(first, tree=tree, upcast=upcast)
                if step.reproduces(sums):
                    return sums
        alike = len(chosen) > 1 and len(set(factors)) == 1 and factors[0] != 1.0
        alike = alike and isinstance(whole, float) and whole == 1.0
        for tree in trees(tuple(range(1, len(chosen) + 1))) if alike else ():
            sums = dataclasses.replace(first, tree=(0, tree), joint=True)
            if step.reproduces(sums):
                return sums
    return None


def _made(
    step: Step,
    chosen: tuple[int, ...],
    keep: float | Tensor,
    scales: tuple[float, ...],
    exact: bool,
    whole: float | Tensor = 1.0,
) -> Decomposition:
    terms = tuple(step.candidates[index] for index in chosen)
    tree = next(trees(tuple(range(len(terms) + 1))))
    return Decomposition(step.start, terms, step.goal, scales, tree, False, exact, keep=keep, whole=whole)


def _is_near(number: float, scale: float) -> bool:
    return abs(number - scale) <= _NEAR * abs(scale)


def _options(scale: float, numbers: Sequence[float]) -> list[float]:
    """Return the numbers of the configuration that a fitted scale may stand for, closest first, then the scale."""
    near = (number for number in numbers if _is_near(number, scale))
    return [*sorted(near, key=lambda number: abs(number - scale))[:MOST_TERMS], scale]
