"""What each block adds to the residual stream, found by additive decomposition: exit = entry + sum of scale * term.

Most blocks are one such sum. Where none holds, the block is taken as two sums, one after the other, with what happens
to the stream itself between them: it may be scaled, or go on as what a norm made of it, as in models whose norms come
after the addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

from .blocks import Chain
from .multi_rank import is_spread
from .probe import Seen, Trace
from .projections import largest_rank
from .sum_search import MOST_TERMS, Step, find_kept_sum, find_sum
from .sums import Decomposition, Sums

MOST_CANDIDATES = 40


@dataclass(frozen=True, slots=True)
class _Norm:
    """A module that makes one activation of another, channel by channel up to statistics of the token."""

    taken: Seen
    given: Seen


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's entry and exit, and the tensors that its modules give."""

    trace: Trace
    root: nn.Module
    path: str
    entry: Seen
    leave: Seen
    candidates: list[Seen]

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' places relative to the block."""
        return tuple(str(seen.place)[len(self.path) :] for seen in self.candidates)

    def step(
        self,
        start: Seen,
        goal: Seen,
        after: int = -1,
        before: float = float("inf"),
        other: Collection[str] = (),
    ) -> Step:
        """Return a step within the block, with what is given between two times as candidates, less other values."""
        known = {start.value, goal.value, *other}
        usable = [c for c in self.candidates if c.value not in known and after < c.place.order < before]
        return Step(self.trace, start, goal, usable)

    def norms(self) -> list[_Norm]:
        """Return the modules in the block that may be norms of the stream, with the last place of what they give."""
        found = []
        last = {seen.value: seen for seen in self.candidates}  # a module around the norm may pass it on
        for given in self.trace.within(self.path, "output"):
            taken = self.trace.one(given.place.path, "input")
            alike = len(taken) == 1 and all(_of_stream(seen, self.entry) for seen in (given, taken[0]))
            if alike and taken[0].value != given.value:
                module = self.root.get_submodule(given.place.path)
                found += [_Norm(taken[0], last.get(given.value, given))] if largest_rank(module) < 2 else []
        return found

    def vectors(self) -> list[Tensor]:
        """Return the block's own parameters of one number per channel."""
        module = self.root.get_submodule(self.path)
        width = self.entry.place.width
        own = [p.detach() for p in module.parameters(recurse=False) if p.device.type != "meta" and p.numel() == width]
        return [vector.to("cpu").reshape(width) for vector in own]

    def numbers(self) -> set[float]:
        """Return the block's own learned numbers; those of modules that give them as outputs are not known."""
        module = self.root.get_submodule(self.path)
        own = [*module.parameters(), *module.buffers()]
        single = [tensor for tensor in own if tensor.numel() == 1 and tensor.is_floating_point()]
        return {float(tensor.detach()) for tensor in single if tensor.device.type != "meta" and not is_spread(tensor)}

    def silent(self, terms: Sequence[Seen]) -> tuple[str, ...]:
        """Return the outermost modules that gave zeros and are in none that makes a contribution."""
        makers = tuple(f"{term.place.path}." for term in terms)
        found: list[str] = []
        for seen in sorted(self.trace.within(self.path, "output"), key=lambda seen: len(seen.place.path)):
            path = f"{seen.place.path}."
            inside = path.startswith((*makers, *(f"{other}." for other in found)))
            if not inside and _of_stream(seen, self.entry) and not self.trace.values[seen.value].any():
                found.append(seen.place.path)
        return tuple(found)


def decompose(chain: Chain, trace: Trace, root: nn.Module, config: Mapping[str, Any]) -> list[Sums | str]:
    """Decompose every block's output.

    Args:
        chain: the blocks.
        trace: one recorded forward.
        root: the model without wrappers.
        config: the model's configuration, whose numbers are tried as scales.

    Returns:
        One decomposition per block, or the reason why there is none.
    """
    numbers = known_numbers(config)
    blocks = [
        _Block(trace, root, path, entry, leave, _candidates(trace, path, entry, leave))
        for path, entry, leave in zip(chain.paths, chain.entries, chain.exits, strict=True)
    ]
    found: list[Sums | None] = []
    hints: list[tuple[_Block, Sums]] = []
    hopeless: set[tuple[str, ...]] = set()
    for block, unchanged in zip(blocks, chain.unchanged, strict=True):
        known = (_transfer(block, *hint) for hint in hints)
        result = next((item for item in known if item is not None), None)
        if result is None and not unchanged and block.names not in hopeless:
            result = _explain(block, sorted(numbers | block.numbers()))
            if result is not None:
                hints.append((block, result))
            else:
                hopeless.add(block.names)
        found.append(result)
    return [_completed(block, result, hints) for block, result in zip(blocks, found, strict=True)]


def _completed(block: _Block, found: Sums | None, hints: Sequence[tuple[_Block, Sums]]) -> Sums | str:
    """Add the contributions of zeros that other blocks of the same modules tell of, or say why there is no sum."""
    least = 0 if found is None else len(found.terms)
    more = (hint for hint in sorted(hints, key=lambda hint: -len(hint[1].terms)) if len(hint[1].terms) > least)
    silent = block.silent(() if found is None else found.terms)
    if silent:
        found = next((item for hint in more if (item := _transfer(block, *hint)) is not None), found)
    if found is not None:
        return dataclasses.replace(found, silent=block.silent(found.terms))
    if block.entry.value != block.leave.value:
        return f"the output of {block.path} is not its input plus outputs of modules in it"
    zeros = f": {', '.join(silent)} gave only zeros" if silent else ""
    return f"{block.path} gave in the probe what it was given{zeros}"


def known_numbers(config: Mapping[str, Any]) -> set[float]:
    """Return the factors that need no fit: those of a configuration, one, and that of what is added twice."""
    return {1.0, 2.0, *_numbers(config)}


def _of_stream(seen: Seen, entry: Seen) -> bool:
    return seen.is_tokens and seen.place.width == entry.place.width


def _candidates(trace: Trace, path: str, entry: Seen, leave: Seen) -> list[Seen]:
    """Return one place per distinct tensor that a module in the block gives: the one closest to the addition."""
    last: dict[str, Seen] = {}
    for seen in trace.within(path, "output"):
        if not _of_stream(seen, entry) or seen.value in (entry.value, leave.value):
            continue
        if not trace.values[seen.value].any():
            continue
        if seen.value not in last or seen.place.order > last[seen.value].place.order:
            last[seen.value] = seen
    return sorted(last.values(), key=lambda seen: seen.place.order)[-MOST_CANDIDATES:]


def _transfer(block: _Block, origin: _Block, known: Sums) -> Sums | None:
    """Try an earlier block's decomposition on the modules of the same names."""

    def moved(seen: Seen | None) -> Seen | None:
        if seen is None or seen.value == origin.entry.value:
            return seen and block.entry
        if seen.value == origin.leave.value:
            return block.leave
        path = block.path + seen.place.path[len(origin.path) :]
        items = block.trace.one(path, seen.place.port)
        return next((s for s in items if s.place.keys == seen.place.keys and _of_stream(s, block.entry)), None)

    stages = []
    for stage in known.stages:
        start, goal, read = moved(stage.start), moved(stage.goal), moved(stage.read)
        terms = tuple(term for term in map(moved, stage.terms) if term is not None)
        whole = start is not None and goal is not None and len(terms) == len(stage.terms)
        fixed = stage.exact and not any(isinstance(factor, Tensor) for factor in stage.factors)
        if not whole or not fixed or (read is None) != (stage.read is None):
            return None
        assert start is not None and goal is not None
        stages.append(dataclasses.replace(stage, start=start, goal=goal, terms=terms, read=read))
    result = Sums(tuple(stages), moved(known.closing))
    linked = all(
        (after.read or after.start).value == before for before, after in _links(result.stages, block.entry.value)
    )
    exact = all(Step(block.trace, stage.start, stage.goal, []).reproduces(stage) for stage in stages)
    closed = (result.closing or stages[-1].goal).value == block.leave.value
    return result if linked and exact and closed else None


def _links(stages: Sequence[Decomposition], entry: str) -> Iterator[tuple[str, Decomposition]]:
    """Yield each stage with the value that it must go on from."""
    for stage in stages:
        yield entry, stage
        entry = stage.goal.value


def _explain(block: _Block, numbers: Sequence[float]) -> Sums | None:
    """Explain a block as one plain sum, else in stages; bit for bit if it can be, else within rounding."""
    if not block.candidates:
        return None
    for exactly in (True, False):
        whole = find_sum(block.step(block.entry, block.leave), numbers, exactly)
        found = Sums((whole,)) if whole is not None else _in_stages(block, numbers, exactly)
        if found is not None:
            return found
    return None


def _in_stages(block: _Block, numbers: Sequence[float], exactly: bool) -> Sums | None:
    """Explain a block by one sum or two, with norms or factors on the stream itself."""
    norms, vectors = block.norms(), block.vectors()

    def summed(before: Seen, goal: Seen, after: int = -1, until: float = float("inf")) -> Decomposition | None:
        """Go on from a value, or from what a norm gives of it, which is nothing that is added."""
        given = {norm.given.value: norm for norm in norms if norm.taken.value == before.value}
        starts = [(before, None), *((norm.given, norm.taken) for norm in given.values())]
        for exact, count in product((True,) if exactly else (True, False), range(1, MOST_TERMS)):
            for start, read in starts:
                step = block.step(start, goal, after, until, other=given)
                found = find_sum(step, numbers, exact, [count])
                found = found or find_kept_sum(step, numbers, vectors, exact, [count])
                if found is not None:
                    return dataclasses.replace(found, read=read)
        return None

    goals: list[tuple[Seen, Seen | None]] = [(block.leave, None)]
    goals += [(norm.taken, norm.given) for norm in norms if norm.given.value == block.leave.value]
    for middle in _middles(block, {goal.value for goal, _ in goals}):
        first = summed(block.entry, middle, until=middle.place.order)
        if first is None:
            continue
        for goal, closing in goals:
            second = summed(middle, goal, after=middle.place.order)
            if second is not None:
                return Sums((first, second), closing)
    for goal, closing in goals:
        whole = summed(block.entry, goal)
        if whole is not None:
            return Sums((whole,), closing)
    return None


def _middles(block: _Block, ends: set[str]) -> list[Seen]:
    """Return what modules of the block read and none of them gave, first readers first."""
    given = {seen.value for seen in block.trace.within(block.path, "output")} | {block.entry.value} | ends
    first: dict[str, Seen] = {}
    for seen in sorted(block.trace.within(block.path, "input"), key=lambda seen: seen.place.order):
        if _of_stream(seen, block.entry) and seen.value not in given:
            first.setdefault(seen.value, seen)
    return list(first.values())


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    """Yield every fractional number of a configuration."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, float):
            yield value
