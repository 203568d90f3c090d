"""Find a model's blocks: propose lists of modules, and accept one only if its chain of tensors is bitwise unbroken.

Two things are no break. A block may give what it was given, as one does that is skipped, or whose last weights are
zero. And the model may scale the stream between two blocks by a power of two, which is exact, as RWKV halves it every
few blocks: then `resid_post` of the one is what the block gives, and `resid_pre` of the next what that block takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .probe import Seen, Trace, configured_layers
from .proposals import proposals


@dataclass(frozen=True, slots=True)
class Chain:
    """The proven blocks of a model.

    Args:
        paths: module paths, first to last.
        entries: what each block takes of the residual stream.
        exits: what each block gives; bitwise the next block's entry, up to its factor.
        layers: the number of each block; blocks that text alone does not run leave gaps.
        evidence: which proposal was accepted.
        refusal: why what the blocks pass on cannot be an activation, empty if it can.
        idle: the number of each block that did not run.
        factors: what the model multiplies the stream by after each block but the last; powers of two.
    """

    paths: tuple[str, ...]
    entries: tuple[Seen, ...]
    exits: tuple[Seen, ...]
    layers: tuple[int, ...]
    evidence: str
    refusal: str = ""
    idle: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def unchanged(self) -> tuple[bool, ...]:
        """Whether each block gave what it was given."""
        return tuple(entry.value == leave.value for entry, leave in zip(self.entries, self.exits, strict=True))


@dataclass(frozen=True, slots=True)
class _Link:
    """What one block gives and the next one takes, and the factor between them."""

    leave: Seen
    entry: Seen
    factor: float = 1.0


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
    links = _linked(trace, paths)
    if isinstance(links, str):
        return links
    if links:
        first = _at(trace.one(paths[0], "input"), links[0].entry)
        last = _at(trace.one(paths[-1], "output"), links[-1].leave)
    else:  # one block: nothing to chain, the write test alone decides
        first = next((seen for seen in trace.one(paths[0], "input") if seen.is_tokens), None)
        last = next((seen for seen in trace.one(paths[0], "output") if seen.is_tokens), None)
    if first is None or last is None:
        return f"the first or last block of {paths[0]} .. {paths[-1]} is called in another way than the others"
    entries = (first, *(link.entry for link in links))
    exits = (*(link.leave for link in links), last)
    factors = tuple(link.factor for link in links)
    scaled = [f"{factor:g} after {path}" for path, factor in zip(paths, factors, strict=False) if factor != 1.0]
    evidence += f"; the model scales the stream by {', '.join(scaled)}" if scaled else ""
    name = f"{paths[0]} .. {paths[-1]}"
    refusal = _refusal(trace, name, (*entries, *exits))
    for here, there in zip(paths, paths[1:], strict=False):
        alike = [given for given, _ in _links(trace, here, there) if given.place.width == first.place.width]
        if not refusal and sum(seen.is_tokens for seen in alike) > 1:  # as reversible blocks do
            refusal = f"the blocks {name} pass on {len(alike)} tensors with a row for each token, not one stream"
    return Chain(tuple(paths), entries, exits, tuple(ran), evidence, refusal, idle, factors)


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


def _linked(trace: Trace, paths: Sequence[str]) -> list[_Link] | str:
    """Return how each block is linked with the next one, or where the chain breaks."""
    pairs = list(zip(paths, paths[1:], strict=False))
    found = [next(_links(trace, here, there), None) for here, there in pairs]
    usual = next((link for link in found if link is not None), None)
    links: list[_Link] = []
    for (here, there), known in zip(pairs, found, strict=True):
        link = _Link(*known) if known is not None else _rare_link(trace, here, there, usual)
        if link is None:
            return f"the output of {here} is not bitwise the input of the next block, nor that times a power of two"
        links.append(link)
    return links


def _rare_link(trace: Trace, here: str, there: str, usual: tuple[Seen, Seen] | None) -> _Link | None:
    """Link two blocks where what is passed on is what the first one was given, or is scaled on its way.

    It must be packed as the stream is between other blocks; where nothing is passed on in the usual way, there must be
    only one tensor on either side that it can be.
    """
    given = [seen for seen in trace.one(here, "output") if seen.is_tokens]
    taken = [seen for seen in trace.one(there, "input") if seen.is_tokens]
    if usual is not None:
        given = [seen for seen in given if seen.place.keys == usual[0].place.keys]
        taken = [seen for seen in taken if seen.place.keys == usual[1].place.keys]
    if len(given) != 1 or len(taken) != 1:
        return None
    factor = 1.0 if given[0].value == taken[0].value else power_of_two(trace, given[0], taken[0])
    return None if factor is None else _Link(given[0], taken[0], factor)


def power_of_two(trace: Trace, before: Seen, after: Seen) -> float | None:
    """Return the power of two that makes one tensor of another, bit for bit; None if there is none."""
    given, taken = trace.values[before.value], trace.values[after.value]
    if given.numel() != taken.numel() or given.dtype != taken.dtype or not given.any():
        return None
    largest = given.reshape(-1)[given.abs().argmax()]
    factor = float(taken.reshape(-1)[given.abs().argmax()]) / float(largest)
    if factor <= 0 or math.frexp(factor)[0] != 0.5:
        return None
    return factor if torch.equal(given.reshape(-1) * factor, taken.reshape(-1)) else None


def _links(trace: Trace, here: str, there: str) -> Iterator[tuple[Seen, Seen]]:
    """Yield what one block gives and the next takes unchanged; what merely passes through a block does not count."""
    untouched = {seen.value for seen in trace.one(here, "input")}
    taken = {seen.value: seen for seen in reversed(trace.one(there, "input"))}
    for seen in trace.one(here, "output"):
        if seen.value in taken and seen.value not in untouched and trace.values[seen.value].is_floating_point():
            yield seen, taken.pop(seen.value)


def _at(items: list[Seen], like: Seen) -> Seen | None:
    """Return the tensor that is packed where `like` is."""
    return next((seen for seen in items if seen.place.keys == like.place.keys), None)
