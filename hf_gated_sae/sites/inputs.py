"""What a sublayer reads: the tensor that its first linear map takes, and by which all it has of the stream reaches it.

A place is proposed by looking back from the contribution, and proven by one forward. The stream is changed before each
block and the recorded value put back at the proposed place: then the contribution must be what it was. If something
within the sublayer works on that tensor first, such as a norm, what the first linear map reads is tested, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .blocks import Chain
from .probe import Seen, Subject, Trace
from .projections import Origin, largest_rank
from .roles import Roles, forward_blocks, noise, restore, slot_at
from .site import Site
from .slots import Edit, Slot, TensorPath
from .sums import Sums, rms

_STEPS = 3  # norms and short convolutions between a sublayer and the residual stream
_SHARE = 0.01  # kernels that add in a random order change a contribution by less, another input by far more


@dataclass(frozen=True, slots=True)
class Branch:
    """One contribution of a block, the way to it, the other contributions' modules, and the values of the stream."""

    block: str
    entry: Seen
    term: Seen
    origin: Origin
    others: tuple[str, ...]
    stream: set[str]

    def is_alone(self, trace: Trace, path: str) -> bool:
        """Whether a module ran once and holds no other contribution."""
        return trace.calls.get(path) == 1 and not any(f"{other}.".startswith(f"{path}.") for other in self.others)

    def inputs(self, trace: Trace, path: str) -> list[Seen]:
        """Return what a module reads that is as wide as the stream and not yet the branch's own outcome."""
        width = self.entry.place.width
        taken = [seen for seen in trace.one(path, "input") if seen.is_tokens and seen.place.width == width]
        return [seen for seen in taken if seen.value not in self.origin.passed]


def read_by(root: nn.Module, trace: Trace, branch: Branch, steps: int = _STEPS) -> TensorPath | str:
    """Return the place of what the sublayer reads that makes a contribution, or the reason why there is none.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        branch: the contribution.
        steps: how many modules without a linear map may stand between the sublayer and the stream.
    """
    found = _proposed(root, trace, branch)
    if isinstance(found, str):
        return found
    fresh = branch.stream | _normed(root, trace, branch.block, branch.stream)
    if found.value in fresh or _maps(root, found.place.path) or not _maps(root, branch.block):
        return found.place
    made = [
        seen
        for seen in trace.within(branch.block, "output")
        if seen.value == found.value and seen.is_tokens and branch.is_alone(trace, seen.place.path)
    ]
    if not made or not steps:
        return f"what {found.place.path} reads comes out of no module of the block"
    origin = Origin("", (*branch.origin.values, found.value), "it lies before another module")
    outermost = min(made, key=lambda seen: len(seen.place.path))
    return read_by(root, trace, dataclasses.replace(branch, term=outermost, origin=origin), steps - 1)


def _proposed(root: nn.Module, trace: Trace, branch: Branch) -> Seen | str:
    """Return what the module reads that makes a contribution: its first input that another module in the block gave.

    The module is the outermost one below the block that holds the projection and no other contribution. Where it also
    takes the stream to add to it, a write there would go into the stream: then it is one within it, or the one that
    gives the projection's input, as in models that have a module for the addition and its norm.
    """
    origin, block = branch.origin, branch.block
    projection = "" if isinstance(origin.projection, str) else origin.projection.place.path
    steps = (projection or branch.term.place.path)[len(block) + 1 :].split(".")
    holding = [".".join((block, *steps[:count])) for count in range(1, len(steps) + 1)]
    alone = [path for path in holding if branch.is_alone(trace, path)]
    if not alone:
        return "no module of the block holds it alone"
    if alone[0] == projection:
        return f"the block calls {projection} and what comes before it one by one"
    given = {branch.entry.value} | {seen.value for seen in trace.within(block, "output")}
    for path in (path for path in alone if path != projection):
        makes = any(seen.value in origin.passed for seen in trace.one(path, "output"))
        inputs = [seen for seen in branch.inputs(trace, path) if makes or seen.value not in branch.stream]
        known = [seen for seen in inputs if seen.value in given] or inputs
        if known:
            return known[0]
    fresh = branch.stream | _normed(root, trace, block, branch.stream)
    makers = sorted(
        {seen.place.path for seen in trace.within(block, "output") if seen.value in origin.passed}, key=len
    )
    for path in makers:
        if path != projection and branch.is_alone(trace, path) and largest_rank(root.get_submodule(path)) >= 2:
            inputs = [seen for seen in branch.inputs(trace, path) if seen.value in fresh]
            if inputs:
                return inputs[0]
    if any(seen.value in branch.stream for seen in branch.inputs(trace, alone[0])):
        return f"what {alone[0]} reads is also what it adds to"
    return f"{alone[0]} reads no tensor of the residual stream's width"


def _normed(root: nn.Module, trace: Trace, block: str, stream: set[str]) -> set[str]:
    """Return what modules without a matrix make of the stream alone."""
    return {
        seen.value
        for seen in trace.within(block, "output")
        if {taken.value for taken in trace.one(seen.place.path, "input")} <= stream
        and largest_rank(root.get_submodule(seen.place.path)) < 2
    }


def _maps(root: nn.Module, path: str) -> list[str]:
    """Return the modules at and below a path that have a matrix of their own; depthwise convolutions have none."""

    def is_map(module: nn.Module) -> bool:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return any(tensor.ndim == 2 or (tensor.ndim > 2 and tensor.shape[1] != 1) for tensor in own)

    return [f"{path}.{name}".strip(".") for name, module in root.get_submodule(path).named_modules() if is_map(module)]


def prove_inputs(
    subject: Subject,
    trace: Trace,
    chain: Chain,
    sums: Sequence[Sums | str],
    roles: Sequence[Roles | str],
    found: Mapping[Site, TensorPath | str],
) -> dict[Site, TensorPath | str]:
    """Prove the proposed inputs of all sublayers by one forward, and by one more where another tensor may be right.

    Returns:
        For each proposed input its place, which may be nearer to the first linear map, or why it is none.
    """
    terms: dict[Site, Seen] = {}
    inner: dict[Site, TensorPath] = {}
    for path, layer, parts, role in zip(chain.paths, chain.layers, sums, roles, strict=True):
        if isinstance(parts, str) or isinstance(role, str):
            continue
        for name, numbers in (("attn_in", role.mixers), ("mlp_in", role.feeders)):
            place = found[Site(name, layer)]
            if isinstance(place, TensorPath):
                terms[Site(name, layer)] = parts.terms[numbers[0] - 1]
                nearer = _at_first_map(subject.root, trace, path, place, chain.entries[0].place.width)
                inner |= {} if nearer is None else {Site(name, layer): nearer}
    outer = {site: place for site in terms if isinstance(place := found[site], TensorPath)}
    proven = _carrying(subject, trace, chain, sums, terms, outer) if outer else set()
    nearest = _carrying(subject, trace, chain, sums, terms, inner) if inner else set()
    return {
        site: inner[site]
        if site in nearest
        else place
        if site in proven
        else f"the sublayer reads more of the block than the {place.port} of {place.path}"
        for site, place in outer.items()
    }


def _at_first_map(root: nn.Module, trace: Trace, block: str, place: TensorPath, width: int) -> TensorPath | None:
    """Return the place of what the first linear map in a module reads, None if that is what the module reads, once."""
    taken = [seen for path in _maps(root, place.path) for seen in trace.one(path, "input") if seen.is_tokens]
    first = min(taken, key=lambda seen: seen.place.order, default=None)
    outside = _value_at(trace, place)
    if sum(seen.value == outside for seen in trace.one(place.path, place.port)) > 1:  # as query, key and value
        return _of_all_readers(trace, block, outside, place)
    if first is None or first.value == outside or first.place.width != width:
        return None
    readers = [seen for seen in trace.within(block, "input") if seen.value == first.value and seen.is_tokens]
    everyone = {seen.place.path for seen in readers}
    for seen in sorted(readers, key=lambda seen: len(seen.place.path)):
        if all(f"{path}.".startswith(f"{seen.place.path}.") for path in everyone):
            return seen.place
    return _of_all_readers(trace, block, first.value, first.place)


def _of_all_readers(trace: Trace, block: str, value: str, place: TensorPath) -> TensorPath:
    """Return where a write reaches all who read a value: what gave it, else the tensor itself at its first reader."""
    given = [seen for seen in trace.within(block, "output") if seen.value == value and seen.is_tokens]
    if given:
        return max(given, key=lambda seen: seen.place.order).place
    return dataclasses.replace(place, in_place=True)


def _carrying(
    subject: Subject,
    trace: Trace,
    chain: Chain,
    sums: Sequence[Sums | str],
    terms: Mapping[Site, Seen],
    places: Mapping[Site, TensorPath],
) -> set[Site]:
    """Return the places that carry all that contributions take of the stream, by one forward with another stream."""
    raw: dict[Slot, Tensor] = {}
    edits: dict[Slot, Edit] = {}
    for index, entry in enumerate(chain.entries):
        clean = trace.values[entry.value]
        edits[slot_at(entry, subject)] = restore(clean + noise(clean, index))
    made: dict[TensorPath, Slot] = {}
    for parts in sums:
        for term in () if isinstance(parts, str) else parts.terms:
            slot = made[term.place] = slot_at(term, subject)
            edits[slot] = restore(trace.values[term.value], raw, slot)
    for site, place in places.items():
        edits[Slot(site, place, subject.root)] = restore(trace.values[_value_at(trace, place)])
    forward_blocks(subject, edits)
    return {site for site in places if _unmoved(raw.get(made[terms[site].place]), trace.values[terms[site].value])}


def _value_at(trace: Trace, place: TensorPath) -> str:
    return next(seen.value for seen in trace.one(place.path, place.port) if seen.place.keys == place.keys)


def _unmoved(found: Tensor | None, clean: Tensor) -> bool:
    if found is None:
        return False
    change = found.double() - clean.reshape(found.shape).double()
    return rms(change) <= _SHARE * rms(clean)
