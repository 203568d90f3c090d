"""Find a model's blocks: propose lists of modules, and accept one only if its chain of tensors is bitwise unbroken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .probe import Seen, Trace
from .proposals import proposals


@dataclass(frozen=True, slots=True)
class Chain:
    """The proven blocks of a model.

    Args:
        paths: module paths, first to last.
        entries: what each block takes of the residual stream.
        exits: what each block gives; bitwise the next block's entry.
        evidence: which proposal was accepted.
    """

    paths: tuple[str, ...]
    entries: tuple[Seen, ...]
    exits: tuple[Seen, ...]
    evidence: str


def find_chain(root: nn.Module, trace: Trace) -> Chain | str:
    """Return the first proposed block list that the trace proves, or the reason why there is none.

    Args:
        root: the model without wrappers.
        trace: one recorded forward of it.
    """
    tried: set[tuple[str, ...]] = set()
    reasons: list[str] = []
    for proposal in proposals():
        for paths in proposal.propose(root):
            if tuple(paths) in tried:
                continue
            tried.add(tuple(paths))
            proven = prove_chain(trace, paths, proposal.name)
            if isinstance(proven, Chain):
                return proven
            if any(
                trace.calls.get(path) for path in paths
            ):  # lists that never ran, such as a vision tower, say nothing
                reasons.append(proven)
    return reasons[0] if reasons else "no list of modules in the model ran in the probe"


def prove_chain(trace: Trace, paths: list[str], evidence: str) -> Chain | str:
    """Check that each block's output is bitwise the next one's input.

    Args:
        trace: one recorded forward.
        paths: the proposed blocks, first to last.
        evidence: the name of the proposal.

    Returns:
        The chain, or the reason why it does not hold.
    """
    name = f"{paths[0]} .. {paths[-1]}"
    for path in paths:
        if trace.calls.get(path, 0) != 1:
            return f"the block {path} ran {trace.calls.get(path, 0)} times in one forward"
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
        return f"the first or last block of {name} is called in another way than the others"
    entries = (first, *(entry for _, entry in known))
    exits = (*(leave for leave, _ in known), last)
    if not all(seen.is_tokens for seen in (*entries, *exits)):
        rank = next(seen.place.rank for seen in (*entries, *exits) if not seen.is_tokens)
        return f"the blocks {name} pass on more than one residual stream (a tensor of rank {rank})"
    if len({seen.place.width for seen in (*entries, *exits)}) != 1:
        return f"the blocks {name} change the width of the residual stream"
    return Chain(tuple(paths), entries, exits, evidence)


def _link(trace: Trace, here: str, there: str) -> tuple[Seen, Seen] | None:
    """Return what one block gives and the next takes unchanged; what merely passes through a block does not count."""
    untouched = {seen.value for seen in trace.one(here, "input")}
    taken = {seen.value: seen for seen in reversed(trace.one(there, "input"))}
    for seen in trace.one(here, "output"):
        if seen.value in taken and seen.value not in untouched and trace.values[seen.value].is_floating_point():
            return seen, taken[seen.value]
    return None


def _at(items: list[Seen], like: Seen) -> Seen | None:
    """Return the tensor that is packed where `like` is."""
    return next((seen for seen in items if seen.place.keys == like.place.keys), None)
