"""Find the inputs of attention and feed-forward (`attn_in`, `mlp_in`), and prove that each carries all of the stream.

1. An input is proposed by searching backwards from the contribution.
2. It is proven by one forward: the stream is changed before each block, and the recorded value is restored at the
   proposed input. The contribution must then be the recorded one.
3. If a module within the sublayer, such as a norm, changes that tensor first, the input of the first linear map is
   tested in the same way, and is the site if it passes.
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
_SHARE = 0.01  # relative change; kernels that add in a random order cause less, an incomplete input far more


@dataclass(frozen=True, slots=True)
class Branch:
    """One contribution of a block.

    Args:
        block: path of the block.
        entry: the block's input from the stream.
        term: the contribution.
        origin: the module that computes it.
        others: paths of the modules of the other contributions.
        stream: digests of the values that the stream has within the block.
    """

    block: str
    entry: Seen
    term: Seen
    origin: Origin
    others: tuple[str, ...]
    stream: set[str]

    def is_exclusive(self, trace: Trace, path: str) -> bool:
        """Whether a module ran once and holds no other contribution."""
        return trace.calls.get(path) == 1 and not any(f"{other}.".startswith(f"{path}.") for other in self.others)

    def inputs(self, trace: Trace, path: str) -> list[Seen]:
        """Return a module's inputs that are as wide as the stream and that the branch has not computed itself."""
        width = self.entry.tensor_path.width
        inputs = [seen for seen in trace.one(path, "input") if seen.is_tokens and seen.tensor_path.width == width]
        return [seen for seen in inputs if seen.value not in self.origin.branch_values]


def sublayer_input(root: nn.Module, trace: Trace, branch: Branch, steps: int = _STEPS) -> TensorPath | str:
    """Propose the tensor path of the input of the sublayer that computes a contribution.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        branch: the contribution.
        steps: how many modules without a linear map may lie between the sublayer and the stream.

    Returns:
        The tensor path, or the reason why there is none.
    """
    found = _proposed_input(root, trace, branch)
    if isinstance(found, str):
        return found
    fresh = branch.stream | _normed_values(root, trace, branch.block, branch.stream)
    if (
        found.value in fresh
        or _modules_with_matrix(root, found.tensor_path.path)
        or not _modules_with_matrix(root, branch.block)
    ):
        return found.tensor_path
    producers = [
        seen
        for seen in trace.within(branch.block, "output")
        if seen.value == found.value and seen.is_tokens and branch.is_exclusive(trace, seen.tensor_path.path)
    ]
    if not producers or not steps:
        return f"the input of {found.tensor_path.path} is not the output of a module in the block"
    origin = Origin("", (*branch.origin.values, found.value), "it lies before another module")
    outermost = min(producers, key=lambda seen: len(seen.tensor_path.path))
    return sublayer_input(root, trace, dataclasses.replace(branch, term=outermost, origin=origin), steps - 1)


def _proposed_input(root: nn.Module, trace: Trace, branch: Branch) -> Seen | str:
    """Return the input of the module that computes a contribution, or the reason why there is none.

    The module is the outermost one in the block that contains the projection and no other contribution. If it also
    adds to the stream, a write at its input would change the stream, too. Then a module within it is used, or the one
    that returns the projection's input, as in models that have one module for the addition and its norm. Of several
    inputs the first that another module of the block returned is used.
    """
    origin, block = branch.origin, branch.block
    projection = "" if isinstance(origin.projection, str) else origin.projection.tensor_path.path
    steps = (projection or branch.term.tensor_path.path)[len(block) + 1 :].split(".")
    containing = [".".join((block, *steps[:count])) for count in range(1, len(steps) + 1)]
    exclusive = [path for path in containing if branch.is_exclusive(trace, path)]
    if not exclusive:
        return "no module of the block contains this contribution and no other"
    if exclusive[0] == projection:
        return f"the block calls {projection} and the modules before it directly"
    outputs = {branch.entry.value} | {seen.value for seen in trace.within(block, "output")}
    for path in (path for path in exclusive if path != projection):
        computes = any(seen.value in origin.branch_values for seen in trace.one(path, "output"))
        inputs = [seen for seen in branch.inputs(trace, path) if computes or seen.value not in branch.stream]
        known = [seen for seen in inputs if seen.value in outputs] or inputs
        if known:
            return known[0]
    fresh = branch.stream | _normed_values(root, trace, block, branch.stream)
    producers = sorted(
        {seen.tensor_path.path for seen in trace.within(block, "output") if seen.value in origin.branch_values},
        key=len,
    )
    for path in producers:
        if path != projection and branch.is_exclusive(trace, path) and largest_rank(root.get_submodule(path)) >= 2:
            inputs = [seen for seen in branch.inputs(trace, path) if seen.value in fresh]
            if inputs:
                return inputs[0]
    if any(seen.value in branch.stream for seen in branch.inputs(trace, exclusive[0])):
        return f"{exclusive[0]} also adds to the tensor that it reads"
    return f"{exclusive[0]} reads no tensor of the residual stream's width"


def _normed_values(root: nn.Module, trace: Trace, block: str, stream: set[str]) -> set[str]:
    """Return digests of the outputs of modules that have no matrix and read the stream alone, as norms do."""
    return {
        seen.value
        for seen in trace.within(block, "output")
        if {read.value for read in trace.one(seen.tensor_path.path, "input")} <= stream
        and largest_rank(root.get_submodule(seen.tensor_path.path)) < 2
    }


def _modules_with_matrix(root: nn.Module, path: str) -> list[str]:
    """Return paths of the modules at and below a path with a matrix of their own; depthwise convolutions have none."""

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
    """Prove the proposed inputs of all sublayers by one forward, and the inputs of their first linear maps by another.

    Returns:
        For each proposed input its tensor path, that of the first linear map's input if it passes, or the reason why
        neither does.
    """
    terms: dict[Site, Seen] = {}
    inner: dict[Site, TensorPath] = {}
    for path, layer, parts, role in zip(chain.paths, chain.layers, sums, roles, strict=True):
        if isinstance(parts, str) or isinstance(role, str):
            continue
        for name, numbers in (("attn_in", role.mixers), ("mlp_in", role.feed_forwards)):
            proposed = found[Site(name, layer)]
            if isinstance(proposed, TensorPath):
                terms[Site(name, layer)] = parts.terms[numbers[0] - 1]
                first = _first_map_input(subject.root, trace, path, proposed, chain.entries[0].tensor_path.width)
                inner |= {} if first is None else {Site(name, layer): first}
    outer = {site: proposed for site in terms if isinstance(proposed := found[site], TensorPath)}
    outer_proven = _sufficient(subject, trace, chain, sums, terms, outer) if outer else set()
    inner_proven = _sufficient(subject, trace, chain, sums, terms, inner) if inner else set()
    return {
        site: inner[site]
        if site in inner_proven
        else tensor_path
        if site in outer_proven
        else f"the sublayer reads more of the block than the {tensor_path.port} of {tensor_path.path}"
        for site, tensor_path in outer.items()
    }


def _first_map_input(root: nn.Module, trace: Trace, block: str, sublayer: TensorPath, width: int) -> TensorPath | None:
    """Return where the first linear map of a sublayer reads, None if it reads the sublayer's own input.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        block: path of the block.
        sublayer: the sublayer's input.
        width: width of the stream.
    """
    maps = _modules_with_matrix(root, sublayer.path)
    reads = [seen for path in maps for seen in trace.one(path, "input") if seen.is_tokens]
    first = min(reads, key=lambda seen: seen.tensor_path.order, default=None)
    outside = _digest_at(trace, sublayer)
    if sum(seen.value == outside for seen in trace.one(sublayer.path, sublayer.port)) > 1:  # as query, key and value
        return _shared_by_readers(trace, block, outside, sublayer)
    if first is None or first.value == outside or first.tensor_path.width != width:
        return None
    readers = [seen for seen in trace.within(block, "input") if seen.value == first.value and seen.is_tokens]
    paths = {seen.tensor_path.path for seen in readers}
    for seen in sorted(readers, key=lambda seen: len(seen.tensor_path.path)):
        if all(f"{path}.".startswith(f"{seen.tensor_path.path}.") for path in paths):
            return seen.tensor_path
    return _shared_by_readers(trace, block, first.value, first.tensor_path)


def _shared_by_readers(trace: Trace, block: str, value: str, first: TensorPath) -> TensorPath:
    """Return where a write changes a value for all its readers.

    That is the output of the module that returns it, else the tensor at its first reader, written in place.
    """
    outputs = [seen for seen in trace.within(block, "output") if seen.value == value and seen.is_tokens]
    if outputs:
        return max(outputs, key=lambda seen: seen.tensor_path.order).tensor_path
    return dataclasses.replace(first, in_place=True)


def _sufficient(
    subject: Subject,
    trace: Trace,
    chain: Chain,
    sums: Sequence[Sums | str],
    terms: Mapping[Site, Seen],
    inputs: Mapping[Site, TensorPath],
) -> set[Site]:
    """Return the sites of the inputs on which alone their contributions depend.

    In one forward the stream is changed before each block and the recorded values are restored at the inputs; a
    contribution that is still the recorded one depends on nothing else.
    """
    found: dict[Slot, Tensor] = {}
    edits: dict[Slot, Edit] = {}
    for index, entry in enumerate(chain.entries):
        clean = trace.values[entry.value]
        edits[slot_at(entry, subject)] = restore(clean + noise(clean, index))
    slots: dict[TensorPath, Slot] = {}
    for parts in sums:
        for term in () if isinstance(parts, str) else parts.terms:
            slot = slots[term.tensor_path] = slot_at(term, subject)
            edits[slot] = restore(trace.values[term.value], found, slot)
    for site, tensor_path in inputs.items():
        edits[Slot(site, tensor_path, subject.root)] = restore(trace.values[_digest_at(trace, tensor_path)])
    forward_blocks(subject, edits)
    return {
        site
        for site in inputs
        if _almost_equal(found.get(slots[terms[site].tensor_path]), trace.values[terms[site].value])
    }


def _digest_at(trace: Trace, tensor_path: TensorPath) -> str:
    recorded = trace.one(tensor_path.path, tensor_path.port)
    return next(seen.value for seen in recorded if seen.tensor_path.keys == tensor_path.keys)


def _almost_equal(found: Tensor | None, clean: Tensor) -> bool:
    if found is None:
        return False
    change = found.double() - clean.reshape(found.shape).double()
    return rms(change) <= _SHARE * rms(clean)
