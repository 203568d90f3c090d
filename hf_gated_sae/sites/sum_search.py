"""Find the tensors of a block whose sum explains the step from one value of the residual stream to a later one.

    goal = sum_scale * (start_scale * start + sum of scale * term)

1. All choices of up to `MOST_TERMS` terms are ranked by their error on a sample of the elements.
2. A sum is accepted as exact when adding its terms in some order gives the goal bit for bit.
3. Where no known factors give that, the factors are fitted by least squares. The fit is accepted if the sum is within
   `TOLERANCE` rounding steps at every element, that is far less than what is added, no other choice of terms comes
   near it, and no further term improves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .probe import Seen, Trace, digest_of
from .sums import TOLERANCE, Decomposition, rms, trees

MOST_TERMS = 3
_SAMPLED = 256  # elements on which choices are ranked before they are summed in full
_TRIED = 32  # choices that are summed in full, best first
_NEAR = 0.2  # a known number within this relative distance of a fitted scale is tried instead of it
_LEAST_START_SCALE = 0.01  # smaller fitted factors of the start do not count as a stream that continues
_SAME = 1.05  # a known number replaces a fitted one if the error grows by no more than this factor
_DROPS = 0.95  # one more tensor improves the sum if it lowers the error below this share, more than chance does
_APART = 4.0  # the next choice of terms must have an error at least this many times larger

Choice = tuple[float, tuple[int, ...], tuple[float, ...]]
"""Root mean square error, indices of the candidates, and their scales."""


@dataclass(frozen=True, slots=True)
class Step:
    """The step to explain, and the tensors that may be its terms."""

    trace: Trace
    start: Seen
    goal: Seen
    candidates: list[Seen]

    def sample(self, seen: Seen) -> Tensor:
        """Return a tensor's values at the sampled elements ``[m]``, in its own type."""
        return self.trace.values[seen.value].reshape(-1)[self._where()]

    def spread(self, vector: Tensor) -> Tensor:
        """Return one value per channel ``[width]`` at the sampled elements ``[m]``."""
        return vector[self._where() % self.goal.tensor_path.width]

    def _where(self) -> Tensor:
        elements = self.trace.values[self.goal.value].numel()
        return torch.randperm(elements, generator=torch.Generator().manual_seed(0))[:_SAMPLED]

    def reproduces(self, sums: Decomposition) -> bool:
        """Whether a decomposition gives the goal bit for bit; most wrong ones fail on the sample."""
        goal = self.trace.values[self.goal.value]
        start_scale, sum_scale = (
            self.spread(f) if isinstance(f, Tensor) else f for f in (sums.start_scale, sums.sum_scale)
        )
        sampled = dataclasses.replace(sums, start_scale=start_scale, sum_scale=sum_scale)
        total = sampled.total(self.sample(self.start), [self.sample(term) for term in sums.terms])
        if not torch.equal(total.to(goal.dtype), self.sample(self.goal)):
            return False
        terms = [self.trace.values[term.value].reshape(goal.shape) for term in sums.terms]
        total = sums.total(self.trace.values[self.start.value].reshape(goal.shape), terms)
        return digest_of(total.to(goal.dtype)) == self.goal.value


def find_sum(
    step: Step, numbers: Sequence[float], exactly: bool, counts: Sequence[int] = range(1, MOST_TERMS + 1)
) -> Decomposition | None:
    """Look for terms that explain what is added to the unchanged stream: unscaled first, then scaled.

    Args:
        step: the step.
        numbers: the configuration's numbers, which are tried as scales.
        exactly: True accepts only sums that reproduce the goal bit for bit, False only fitted ones.
        counts: numbers of terms to try.
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
        best = _unambiguous(_ranked(columns, after - before, count, scaled=True), slack, rms(after - before))
        found = None if best is None else _rounded(step, best[1], 1.0, best[2], numbers)
        if found is not None:
            return found
    return None


def find_scaled_sum(
    step: Step, numbers: Sequence[float], vectors: Sequence[Tensor], exactly: bool, counts: Sequence[int]
) -> Decomposition | None:
    """Look for a sum in which the stream itself is scaled, before or after the addition, by a vector or by a number.

    Args:
        step: the step.
        numbers: the configuration's numbers, which are tried as factors.
        vectors: the block's own vectors ``[width]``.
        exactly: True accepts only sums that reproduce the goal bit for bit, False only fitted ones.
        counts: numbers of terms to try.
    """
    counts = [count for count in counts if count <= len(step.candidates)]
    if not counts:
        return None
    before, after, columns, slack = _sampled(step)
    for vector, count in product(vectors if exactly else (), counts):
        by = step.spread(vector).double()
        for scales_sum in (True, False):
            ranked = _ranked(columns * by if scales_sum else columns, after - by * before, count, scaled=False)
            for error, chosen, _ in ranked[:_TRIED]:
                start_scales, sum_scales = ([1.0], [vector]) if scales_sum else ([vector], [1.0])
                exact = _exact(step, chosen, [[1.0]] * count, start_scales, sum_scales) if error <= slack else None
                if exact is not None:
                    return exact
    both = torch.cat([before.unsqueeze(0), columns])
    for count in counts:
        ranked = [
            c
            for c in _ranked(both, after, count + 1, scaled=True)
            if c[1][0] == 0 and abs(c[2][0]) > _LEAST_START_SCALE
        ]
        for error, (_, *picked), factors in ranked[:_TRIED] if exactly else ():
            chosen = tuple(index - 1 for index in picked)
            exact = _exact_scaled(step, chosen, factors, numbers) if error <= slack else None
            if exact is not None:
                return exact
        best = None if exactly else _unambiguous(ranked, slack, rms(after))
        terms = () if best is None else tuple(index - 1 for index in best[1][1:])
        found = None if best is None else _rounded(step, terms, best[2][0], best[2][1:], numbers)
        if found is not None:
            return found
    return None


def _exact_scaled(
    step: Step, chosen: tuple[int, ...], factors: tuple[float, ...], numbers: Sequence[float]
) -> Decomposition | None:
    """Find which factors scale the whole sum and which its parts, so that it reproduces the goal bit for bit.

    Scaling the sum by a power of two gives the same bits as scaling each part, so more than one answer may fit. They
    are tried in this order: unscaled terms, terms with known factors, then terms with any factors.
    """
    start_scale, *scales = factors
    ones = [[1.0]] * len(chosen)
    sum_scales, known = _options(start_scale, numbers), [_options(factor, numbers)[:-1] for factor in factors]
    shared = all(_is_near(scale, start_scale) for scale in scales)
    found = _exact(step, chosen, ones, sum_scales=sum_scales) if shared else None
    found = found or _exact(step, chosen, known[1:], known[0])
    relative = [_options(scale / start_scale, numbers) for scale in scales]
    found = found or _exact(step, chosen, relative, sum_scales=sum_scales)
    return found or _exact(step, chosen, [_options(scale, numbers) for scale in scales], sum_scales)


def _sampled(step: Step) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return start, goal and candidates at the sampled elements in double precision, and the allowed error."""
    before, after = step.sample(step.start).double(), step.sample(step.goal).double()
    columns = torch.stack([step.sample(seen).double() for seen in step.candidates])
    step_size = max(torch.finfo(step.sample(seen).dtype).eps for seen in (step.start, step.goal, *step.candidates))
    return before, after, columns, TOLERANCE * step_size * max(rms(row) for row in (before, after, *columns))


def _ranked(columns: Tensor, wanted: Tensor, count: int, scaled: bool) -> list[Choice]:
    """Return the best choices of `count` rows of `columns` ``[n, m]`` whose sum is `wanted` ``[m]``, best first."""
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


def _unambiguous(ranked: Sequence[Choice], slack: float, size: float) -> Choice | None:
    """Return the best choice if its error is within rounding, `size` is far above that, and no other comes near it."""
    if not ranked:
        return None
    best, *others = ranked[:2]
    within = best[0] <= slack <= size / _APART**2
    return best if within and all(other[0] >= _APART * best[0] for other in others) else None


def _rounded(
    step: Step, chosen: tuple[int, ...], start_scale: float, scales: tuple[float, ...], numbers: Sequence[float]
) -> Decomposition | None:
    """Return a sum with fitted factors if it is within rounding at every element, and no further term improves it.

    Known numbers replace fitted ones where the error stays the same.
    """
    values = step.trace.values
    shape = values[step.goal.value].shape
    before, after = (values[seen.value].reshape(shape).double() for seen in (step.start, step.goal))
    terms = [values[step.candidates[index].value].reshape(shape).double() for index in chosen]
    fitted = (start_scale, *scales)

    def residual(factors: Sequence[float]) -> Tensor:
        return after - sum((part * factor for part, factor in zip((before, *terms), factors, strict=True)), 0 * after)

    allowed = _SAME * rms(residual(fitted))
    start_scales = [1.0] if start_scale == 1.0 else _options(start_scale, numbers)
    shared = start_scale != 1.0 and all(_is_near(scale, start_scale) for scale in scales)
    equal = [(factor,) * len(fitted) for factor in start_scales if shared]
    tried = (*equal, *product(start_scales, *(_options(scale, numbers) for scale in scales)))
    factors = next((known for known in tried if rms(residual(known)) <= allowed), fitted)
    left = residual(factors)
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
            return None  # a contribution as small as the rounding is missing
    if len(set(factors)) == 1:  # a factor that all parts share scales the whole sum
        return _decomposition(step, chosen, 1.0, (1.0,) * len(chosen), exact=False, sum_scale=factors[0])
    return _decomposition(step, chosen, factors[0], tuple(factors[1:]), exact=False)


def _exact(
    step: Step,
    chosen: tuple[int, ...],
    options: Sequence[Sequence[float]],
    start_scales: Sequence[float | Tensor] = (1.0,),
    sum_scales: Sequence[float | Tensor] = (1.0,),
) -> Decomposition | None:
    """Return the first order of additions and choice of factors that reproduce the goal bit for bit."""
    for sum_scale, start_scale, factors in product(sum_scales, start_scales, product(*options)):
        first = _decomposition(step, chosen, start_scale, factors, exact=True, sum_scale=sum_scale)
        for upcast in (False, True):
            for tree in trees(tuple(range(len(chosen) + 1))):
                sums = dataclasses.replace(first, tree=tree, upcast=upcast)
                if step.reproduces(sums):
                    return sums
        shared = len(chosen) > 1 and len(set(factors)) == 1 and factors[0] != 1.0
        shared = shared and isinstance(sum_scale, float) and sum_scale == 1.0
        for tree in trees(tuple(range(1, len(chosen) + 1))) if shared else ():
            sums = dataclasses.replace(first, tree=(0, tree), joint=True)
            if step.reproduces(sums):
                return sums
    return None


def _decomposition(
    step: Step,
    chosen: tuple[int, ...],
    start_scale: float | Tensor,
    scales: tuple[float, ...],
    exact: bool,
    sum_scale: float | Tensor = 1.0,
) -> Decomposition:
    terms = tuple(step.candidates[index] for index in chosen)
    tree = next(trees(tuple(range(len(terms) + 1))))
    return Decomposition(
        step.start, terms, step.goal, scales, tree, False, exact, start_scale=start_scale, sum_scale=sum_scale
    )


def _is_near(number: float, scale: float) -> bool:
    return abs(number - scale) <= _NEAR * abs(scale)


def _options(scale: float, numbers: Sequence[float]) -> list[float]:
    """Return the known numbers near a fitted scale, closest first, then the fitted scale itself."""
    near = (number for number in numbers if _is_near(number, scale))
    return [*sorted(near, key=lambda number: abs(number - scale))[:MOST_TERMS], scale]
