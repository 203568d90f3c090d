"""Find a model's blocks: propose lists of modules, and accept one only if its chain of tensors is bitwise unbroken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .probe import Seen, Trace, configured_layers
from .proposals import proposals


@dataclass(frozen=True, slots=True)
class Chain:
    """The proven blocks of a model.

    Args:
        paths: module paths, first to last.
        entries: what each block takes of the residual stream.
        exits: what each block gives; bitwise the next block's entry.
        layers: the number of each block; blocks that text alone does not run leave gaps.
        evidence: which proposal was accepted.
        refusal: why what the blocks pass on cannot be an activation, empty if it can.
        idle: the number of each block that did not run.
    """

    paths: tuple[str, ...]
    entries: tuple[Seen, ...]
    exits: tuple[Seen, ...]
    layers: tuple[int, ...]
    evidence: str
    refusal: str = ""
    idle: tuple[int, ...] = ()


def find_chain(root: nn.Module, trace: Trace) -> Chain | str:
    """Return the first proposed block list that the trace proves, or the reason why there is none.

    Args:
        root: the model without wrappers.
        trace: one recorded forward of it.
    """
    tried: set[tuple[str, ...]] = set()
    reasons: list[str] = []
    odd: list[Chain] = []
    single: list[Chain] = []  # of one block there is nothing to prove: it stands for the model where nothing else does
    for proposal in proposals():
        for paths in proposal.propose(root):
            if tuple(paths) in tried:
                continue
            tried.add(tuple(paths))
            if len(paths) == 1 and configured_layers(root) > 1:
                continue
            left_out = _left_out(trace, paths)
            if left_out:  # some blocks of a hybrid model are of another class
                reasons.append(f"{left_out} ran beside {paths[0]} .. {paths[-1]}, and they make no chain together")
                continue
            proven = prove_chain(trace, paths, proposal.name)
            if isinstance(proven, Chain):
                if not proven.refusal and len(paths) > 1:
                    return proven
                (odd if proven.refusal else single).append(proven)
            elif any(
                trace.calls.get(path) for path in paths
            ):  # lists that never ran, such as a vision tower, say nothing
                reasons.append(proven)
    if odd or single:
        return [*odd, *single][0]
    return reasons[0] if reasons else "no list of modules in the model ran in the probe"


def _left_out(trace: Trace, paths: list[str]) -> str:
    """Return a module of the same list that ran and is not among those proposed; empty if there is none."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return ""
    listed = {path for path in trace.calls if path.rpartition(".")[0] in parents and path.rpartition(".")[2].isdigit()}
    return min(listed - set(paths), default="")


def prove_chain(trace: Trace, paths: list[str], evidence: str) -> Chain | str:
    """Check that each block's output is bitwise the next one's input.

    Args:
        trace: one recorded forward.
        paths: the proposed blocks, first to last.
        evidence: the name of the proposal.

    Returns:
        The chain, or the reason why it does not hold.
    """
    for path in paths:
        if trace.calls.get(path, 0) > 1:
            return f"the block {path} ran {trace.calls[path]} times in one forward"
    ran = [layer for layer, path in enumerate(paths) if trace.calls.get(path)]
    if 2 * len(ran) < len(paths):
        return f"the block {next(path for path in paths if not trace.calls.get(path))} ran 0 times in one forward"
    idle = tuple(layer for layer in range(len(paths)) if layer not in ran)
    paths = [paths[layer] for layer in ran]
    links = [_link(trace, here, there) for here, there in zip(paths, paths[1:], strict=False)]
    for here, link in zip(paths, links, strict=False):
        if link is None:
            return f"the output of {here} is not bitwise the input of the next block"
    known = [link for link in links if link is not None]
    if known:
        first = _at(trace.one(paths[0], "input"), known[0][1])
        last = _at(trace.one(paths[-1], "output"), known[-1][0])
    else:  # one block: nothing to chain, the write test alone decides
        first = next((seen for seen in trace.one(paths[0], "input") if seen.is_tokens), None)
        last = next((seen for seen in trace.one(paths[0], "output") if seen.is_tokens), None)
    if first is None or last is None:
        return f"the first or last block of {paths[0]} .. {paths[-1]} is called in another way than the others"
    entries = (first, *(entry for _, entry in known))
    exits = (*(leave for leave, _ in known), last)
    name = f"{paths[0]} .. {paths[-1]}"
    refusal = _refusal(trace, name, (*entries, *exits))
    for here, there in zip(paths, paths[1:], strict=False):
        alike = [given for given, _ in _links(trace, here, there) if given.place.width == first.place.width]
        if not refusal and sum(seen.is_tokens for seen in alike) > 1:  # as reversible blocks do
            refusal = f"the blocks {name} pass on {len(alike)} tensors with a row for each token, not one stream"
    return Chain(tuple(paths), entries, exits, tuple(ran), evidence, refusal, idle)


def _refusal(trace: Trace, name: str, stream: tuple[Seen, ...]) -> str:
    """Return why what blocks pass on is not one residual stream with one row per token, empty if it is."""
    batch, sequence = trace.tokens
    for seen in stream:
        shape = list(trace.values[seen.value].shape)
        if len(shape) > 3:
            return (
                f"the blocks {name} pass on {shape}, more than one residual stream, for [{batch}, {sequence}] tokens"
            )
        if not seen.is_tokens:
            return f"the blocks {name} pass on {shape}, not one row for each of the [{batch}, {sequence}] tokens"
    if len({seen.place.width for seen in stream}) != 1:
        return f"the blocks {name} change the width of the residual stream"
    return ""


def _link(trace: Trace, here: str, there: str) -> tuple[Seen, Seen] | None:
    """Return what one block gives and the next takes unchanged; what merely passes through a block does not count."""
    return next(_links(trace, here, there), None)


def _links(trace: Trace, here: str, there: str) -> Iterator[tuple[Seen, Seen]]:
    untouched = {seen.value for seen in trace.one(here, "input")}
    taken = {seen.value: seen for seen in reversed(trace.one(there, "input"))}
    for seen in trace.one(here, "output"):
        if seen.value in taken and seen.value not in untouched and trace.values[seen.value].is_floating_point():
            yield seen, taken.pop(seen.value)


def _at(items: list[Seen], like: Seen) -> Seen | None:
    """Return the tensor that is packed where `like` is."""
    return next((seen for seen in items if seen.place.keys == like.place.keys), None)
