"""Find a model's blocks: the first proposed list of modules in which each block's output is the next block's input.

1. Proposals come from the model's metadata and its module lists.
2. In one recorded forward, each block's output must equal the next block's input, bit for bit.
3. A block may return its input unchanged, if it is skipped or its last weights are zero.
4. The model may scale the stream between two blocks by a power of two, as RWKV halves it every few blocks. Then
   `resid_post` is the first block's output, and `resid_pre` the second block's input.
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
        entries: each block's input from the residual stream.
        exits: each block's output; times the factor, bitwise the next block's entry.
        layers: the number of each block; blocks that do not run on text alone leave gaps.
        evidence: which proposal was accepted.
        refusal: why the tensors between the blocks cannot be activations; empty if they can.
        idle: the number of each block that did not run.
        factors: the power of two by which the model scales the stream after each block but the last.
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
        """Whether each block returned its input unchanged."""
        return tuple(entry.value == exit_.value for entry, exit_ in zip(self.entries, self.exits, strict=True))


@dataclass(frozen=True, slots=True)
class _Link:
    """One block's output, the next block's input, and the factor between them."""

    exit: Seen
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
    unusable: list[Chain] = []
    single: list[Chain] = []  # one block alone has no link to prove: it is taken only if there is no longer chain
    for proposal in proposals():
        for paths in proposal.propose(root):
            if tuple(paths) in tried:
                continue
            tried.add(tuple(paths))
            if len(paths) == 1 and configured_layers(root) > 1:
                continue
            omitted = _omitted_member(trace, paths)
            if omitted:  # some blocks of a hybrid model are of another class
                reasons.append(f"{omitted} ran too, but is not among the proposed blocks {paths[0]} .. {paths[-1]}")
                continue
            proven = prove_chain(trace, paths, proposal.name)
            if isinstance(proven, Chain):
                if not proven.refusal and len(paths) > 1:
                    return proven
                (unusable if proven.refusal else single).append(proven)
            elif any(map(trace.calls.get, paths)):  # a list that did not run, such as a vision tower's, is no reason
                reasons.append(proven)
    if unusable or single:
        return [*unusable, *single][0]
    return reasons[0] if reasons else "no list of modules in the model ran in the probe"


def _omitted_member(trace: Trace, paths: list[str]) -> str:
    """Return the path of a module of the same list that ran and was not proposed; empty if there is none."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return ""
    listed = {path for path in trace.calls if path.rpartition(".")[0] in parents and path.rpartition(".")[2].isdigit()}
    return min(listed - set(paths), default="")


def prove_chain(trace: Trace, paths: list[str], evidence: str) -> Chain | str:
    """Check that each block's output, perhaps times a power of two, is bitwise the next block's input.

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
    links = _links(trace, paths)
    if isinstance(links, str):
        return links
    if links:
        first = _same_keys(trace.one(paths[0], "input"), links[0].entry)
        last = _same_keys(trace.one(paths[-1], "output"), links[-1].exit)
    else:  # one block has no link to prove: whether writes reach the logits decides
        first = next((seen for seen in trace.one(paths[0], "input") if seen.is_tokens), None)
        last = next((seen for seen in trace.one(paths[0], "output") if seen.is_tokens), None)
    if first is None or last is None:
        return f"the first or last block of {paths[0]} .. {paths[-1]} takes or returns the stream unlike the others"
    entries = (first, *(link.entry for link in links))
    exits = (*(link.exit for link in links), last)
    factors = tuple(link.factor for link in links)
    scaled = [f"{factor:g} after {path}" for path, factor in zip(paths, factors, strict=False) if factor != 1.0]
    evidence += f"; the model scales the stream by {', '.join(scaled)}" if scaled else ""
    name = f"{paths[0]} .. {paths[-1]}"
    refusal = _refusal(trace, name, (*entries, *exits))
    for here, there in zip(paths, paths[1:], strict=False):
        alike = [
            given
            for given, _ in _unscaled_links(trace, here, there)
            if given.is_tokens and given.tensor_path.width == first.tensor_path.width
        ]
        if not refusal and len(alike) > 1:  # as reversible blocks do
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
    if len({seen.tensor_path.width for seen in stream}) != 1:
        return f"the blocks {name} change the width of the residual stream"
    return ""


def _links(trace: Trace, paths: Sequence[str]) -> list[_Link] | str:
    """Return the link between each block and the next, or where the chain breaks."""
    pairs = list(zip(paths, paths[1:], strict=False))
    found = [next(_unscaled_links(trace, here, there), None) for here, there in pairs]
    usual = next((link for link in found if link is not None), None)  # shows where blocks pack the stream
    links: list[_Link] = []
    for (here, there), known in zip(pairs, found, strict=True):
        link = _Link(*known) if known is not None else _unchanged_or_scaled_link(trace, here, there, usual)
        if link is None:
            return f"the output of {here} is not bitwise the input of the next block, nor that times a power of two"
        links.append(link)
    return links


def _unchanged_or_scaled_link(trace: Trace, here: str, there: str, usual: tuple[Seen, Seen] | None) -> _Link | None:
    """Link two blocks where the first returns its input unchanged, or the model scales its output.

    The stream must be packed as it is between other blocks. Where no other link shows that, each side must have only
    one tensor with a row per token.
    """
    outputs = [seen for seen in trace.one(here, "output") if seen.is_tokens]
    inputs = [seen for seen in trace.one(there, "input") if seen.is_tokens]
    if usual is not None:
        outputs = [seen for seen in outputs if seen.tensor_path.keys == usual[0].tensor_path.keys]
        inputs = [seen for seen in inputs if seen.tensor_path.keys == usual[1].tensor_path.keys]
    if len(outputs) != 1 or len(inputs) != 1:
        return None
    factor = 1.0 if outputs[0].value == inputs[0].value else power_of_two(trace, outputs[0], inputs[0])
    return None if factor is None else _Link(outputs[0], inputs[0], factor)


def power_of_two(trace: Trace, first: Seen, second: Seen) -> float | None:
    """Return the power of two that, times the first tensor, equals the second bit for bit; None if there is none."""
    before, after = trace.values[first.value], trace.values[second.value]
    if before.numel() != after.numel() or before.dtype != after.dtype or not before.any():
        return None
    largest = before.reshape(-1)[before.abs().argmax()]
    factor = float(after.reshape(-1)[before.abs().argmax()]) / float(largest)
    if factor <= 0 or math.frexp(factor)[0] != 0.5:
        return None
    return factor if torch.equal(before.reshape(-1) * factor, after.reshape(-1)) else None


def _unscaled_links(trace: Trace, here: str, there: str) -> Iterator[tuple[Seen, Seen]]:
    """Yield outputs of one block that are inputs of the next; tensors that a block returns unchanged do not count."""
    own_inputs = {seen.value for seen in trace.one(here, "input")}
    inputs = {seen.value: seen for seen in reversed(trace.one(there, "input"))}
    for seen in trace.one(here, "output"):
        if seen.value in inputs and seen.value not in own_inputs and trace.values[seen.value].is_floating_point():
            yield seen, inputs.pop(seen.value)


def _same_keys(items: list[Seen], like: Seen) -> Seen | None:
    """Return the tensor that has the same keys in its module's input or output as `like`."""
    return next((seen for seen in items if seen.tensor_path.keys == like.tensor_path.keys), None)
