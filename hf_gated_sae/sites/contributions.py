"""Find what each block adds to the residual stream: ``exit = entry + sum of scale * term``.

1. The terms are outputs of the block's modules, chosen so that their sum gives the block's output in the probe.
2. Where no such sum holds, two sums in sequence are tried. The stream itself may be scaled or normed in each, as in
   models whose norms come after the addition.
3. Later blocks first try the decomposition of an earlier block, on the modules of the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

from .blocks import Chain
from .multi_rank import is_distributed
from .probe import Seen, Trace
from .projections import largest_rank
from .sum_search import MOST_TERMS, Step, find_scaled_sum, find_sum
from .sums import Decomposition, Sums

MOST_CANDIDATES = 40


@dataclass(frozen=True, slots=True)
class _Norm:
    """A module without a matrix that turns one activation into another, as a norm does."""

    input: Seen
    output: Seen


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's input and output of the stream, and the outputs of its modules that may be terms."""

    trace: Trace
    root: nn.Module
    path: str
    entry: Seen
    exit: Seen
    candidates: list[Seen]

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' module paths and ports relative to the block."""
        return tuple(str(seen.tensor_path)[len(self.path) :] for seen in self.candidates)

    def step(
        self,
        start: Seen,
        goal: Seen,
        after: int = -1,
        before: float = float("inf"),
        excluded: Collection[str] = (),
    ) -> Step:
        """Return a step within the block, whose candidates are the outputs between two times, less excluded values."""
        known = {start.value, goal.value, *excluded}
        usable = [c for c in self.candidates if c.value not in known and after < c.tensor_path.order < before]
        return Step(self.trace, start, goal, usable)

    def norms(self) -> list[_Norm]:
        """Return the modules in the block that may be norms of the stream."""
        found = []
        last = {seen.value: seen for seen in self.candidates}  # a module around the norm may return its output
        for output in self.trace.within(self.path, "output"):
            inputs = self.trace.one(output.tensor_path.path, "input")
            of_stream = len(inputs) == 1 and all(_of_stream(seen, self.entry) for seen in (output, inputs[0]))
            if of_stream and inputs[0].value != output.value:
                module = self.root.get_submodule(output.tensor_path.path)
                found += [_Norm(inputs[0], last.get(output.value, output))] if largest_rank(module) < 2 else []
        return found

    def vectors(self) -> list[Tensor]:
        """Return the block's own parameters with one number per channel; those of its submodules are not included."""
        module = self.root.get_submodule(self.path)
        width = self.entry.tensor_path.width
        own = [p.detach() for p in module.parameters(recurse=False) if p.device.type != "meta" and p.numel() == width]
        return [vector.to("cpu").reshape(width) for vector in own]

    def numbers(self) -> set[float]:
        """Return the single numbers among the parameters and buffers of the block and its submodules."""
        module = self.root.get_submodule(self.path)
        own = [*module.parameters(), *module.buffers()]
        single = [tensor for tensor in own if tensor.numel() == 1 and tensor.is_floating_point()]
        return {
            float(tensor.detach()) for tensor in single if tensor.device.type != "meta" and not is_distributed(tensor)
        }

    def zero_modules(self, terms: Sequence[Seen]) -> tuple[str, ...]:
        """Return the outermost modules whose output was all zero and that are not inside a contributing module."""
        contributing = tuple(f"{term.tensor_path.path}." for term in terms)
        found: list[str] = []
        for seen in sorted(self.trace.within(self.path, "output"), key=lambda seen: len(seen.tensor_path.path)):
            path = f"{seen.tensor_path.path}."
            inside = path.startswith((*contributing, *(f"{other}." for other in found)))
            if not inside and _of_stream(seen, self.entry) and not self.trace.values[seen.value].any():
                found.append(seen.tensor_path.path)
        return tuple(found)


def decompose(chain: Chain, trace: Trace, root: nn.Module, config: Mapping[str, Any]) -> list[Sums | str]:
    """Decompose every block's output into its input and contributions.

    Args:
        chain: the blocks.
        trace: one recorded forward.
        root: the model without wrappers.
        config: the model's configuration, whose numbers are tried as scales.

    Returns:
        For each block its sums, or the reason why none were found.
    """
    numbers = known_numbers(config)
    blocks = [
        _Block(trace, root, path, entry, exit_, _candidates(trace, path, entry, exit_))
        for path, entry, exit_ in zip(chain.paths, chain.entries, chain.exits, strict=True)
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
    """Add contributions that are all zero here and known from other blocks, or return why there is no sum."""
    least = 0 if found is None else len(found.terms)
    more = (hint for hint in sorted(hints, key=lambda hint: -len(hint[1].terms)) if len(hint[1].terms) > least)
    zero_modules = block.zero_modules(() if found is None else found.terms)
    if zero_modules:
        found = next((item for hint in more if (item := _transfer(block, *hint)) is not None), found)
    if found is not None:
        return dataclasses.replace(found, zero_modules=block.zero_modules(found.terms))
    if block.entry.value != block.exit.value:
        return f"the output of {block.path} is not its input plus outputs of modules in it"
    zeros = f": all outputs of {', '.join(zero_modules)} were zero" if zero_modules else ""
    return f"{block.path} returned its input unchanged in the probe{zeros}"


def known_numbers(config: Mapping[str, Any]) -> set[float]:
    """Return the factors that are tried without a fit: a configuration's numbers, 1, and 2 for a doubled term."""
    return {1.0, 2.0, *_numbers(config)}


def _of_stream(seen: Seen, entry: Seen) -> bool:
    return seen.is_tokens and seen.tensor_path.width == entry.tensor_path.width


def _candidates(trace: Trace, path: str, entry: Seen, exit_: Seen) -> list[Seen]:
    """Return the distinct outputs of a block's modules; of equal ones the last, which is closest to the addition."""
    last: dict[str, Seen] = {}
    for seen in trace.within(path, "output"):
        if not _of_stream(seen, entry) or seen.value in (entry.value, exit_.value):
            continue
        if not trace.values[seen.value].any():
            continue
        if seen.value not in last or seen.tensor_path.order > last[seen.value].tensor_path.order:
            last[seen.value] = seen
    return sorted(last.values(), key=lambda seen: seen.tensor_path.order)[-MOST_CANDIDATES:]


def _transfer(block: _Block, origin: _Block, known: Sums) -> Sums | None:
    """Return an earlier block's decomposition with this block's modules of the same names, if it holds exactly."""

    def counterpart(seen: Seen | None) -> Seen | None:
        if seen is None or seen.value == origin.entry.value:
            return seen and block.entry
        if seen.value == origin.exit.value:
            return block.exit
        path = block.path + seen.tensor_path.path[len(origin.path) :]
        items = block.trace.one(path, seen.tensor_path.port)
        return next(
            (s for s in items if s.tensor_path.keys == seen.tensor_path.keys and _of_stream(s, block.entry)), None
        )

    stages = []
    for stage in known.stages:
        start, goal, norm_input = counterpart(stage.start), counterpart(stage.goal), counterpart(stage.norm_input)
        terms = tuple(term for term in map(counterpart, stage.terms) if term is not None)
        complete = start is not None and goal is not None and len(terms) == len(stage.terms)
        fixed = stage.exact and not any(isinstance(factor, Tensor) for factor in stage.factors)
        if not complete or not fixed or (norm_input is None) != (stage.norm_input is None):
            return None
        assert start is not None and goal is not None
        stages.append(dataclasses.replace(stage, start=start, goal=goal, terms=terms, norm_input=norm_input))
    result = Sums(tuple(stages), counterpart(known.norm_output))
    linked = all(
        (after.norm_input or after.start).value == before for before, after in _links(result.stages, block.entry.value)
    )
    exact = all(Step(block.trace, stage.start, stage.goal, []).reproduces(stage) for stage in stages)
    gives_output = (result.norm_output or stages[-1].goal).value == block.exit.value
    return result if linked and exact and gives_output else None


def _links(stages: Sequence[Decomposition], entry: str) -> Iterator[tuple[str, Decomposition]]:
    """Yield each stage with the value that it must start from."""
    for stage in stages:
        yield entry, stage
        entry = stage.goal.value


def _explain(block: _Block, numbers: Sequence[float]) -> Sums | None:
    """Explain a block as one plain sum, else in stages; bit for bit if possible, else within rounding."""
    if not block.candidates:
        return None
    for exactly in (True, False):
        plain = find_sum(block.step(block.entry, block.exit), numbers, exactly)
        found = Sums((plain,)) if plain is not None else _in_stages(block, numbers, exactly)
        if found is not None:
            return found
    return None


def _in_stages(block: _Block, numbers: Sequence[float], exactly: bool) -> Sums | None:
    """Explain a block by one sum or two in sequence, in which the stream itself may be scaled or normed."""
    norms, vectors = block.norms(), block.vectors()

    def summed(before: Seen, goal: Seen, after: int = -1, until: float = float("inf")) -> Decomposition | None:
        """Explain a goal as a sum that starts from a value, or from a norm of it; that norm's output is no term."""
        normed = {norm.output.value: norm for norm in norms if norm.input.value == before.value}
        starts = [(before, None), *((norm.output, norm.input) for norm in normed.values())]
        for exact, count in product((True,) if exactly else (True, False), range(1, MOST_TERMS)):
            for start, norm_input in starts:
                step = block.step(start, goal, after, until, excluded=normed)
                found = find_sum(step, numbers, exact, [count])
                found = found or find_scaled_sum(step, numbers, vectors, exact, [count])
                if found is not None:
                    return dataclasses.replace(found, norm_input=norm_input)
        return None

    goals: list[tuple[Seen, Seen | None]] = [(block.exit, None)]
    goals += [(norm.input, norm.output) for norm in norms if norm.output.value == block.exit.value]
    for middle in _middles(block, {goal.value for goal, _ in goals}):
        first = summed(block.entry, middle, until=middle.tensor_path.order)
        if first is None:
            continue
        for goal, norm_output in goals:
            second = summed(middle, goal, after=middle.tensor_path.order)
            if second is not None:
                return Sums((first, second), norm_output)
    for goal, norm_output in goals:
        single = summed(block.entry, goal)
        if single is not None:
            return Sums((single,), norm_output)
    return None


def _middles(block: _Block, ends: set[str]) -> list[Seen]:
    """Return values that a module of the block reads and none returns: sums that the block itself computes.

    They are in the order in which they are first read.
    """
    outputs = {seen.value for seen in block.trace.within(block.path, "output")} | {block.entry.value} | ends
    first: dict[str, Seen] = {}
    for seen in sorted(block.trace.within(block.path, "input"), key=lambda seen: seen.tensor_path.order):
        if _of_stream(seen, block.entry) and seen.value not in outputs:
            first.setdefault(seen.value, seen)
    return list(first.values())


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    """Yield every fractional number of a configuration."""
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, float):
            yield value
