"""The linear module that a contribution comes out of, proven to be linear by what it gives for a sum of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Chain
from .probe import Seen, Subject, Trace
from .roles import forward_blocks, noted, restore, slot_at
from .slots import Edit, Slot
from .sums import Sums

_STEPS = 3  # norms and dropouts between a projection and the residual stream
_SIZE = 8.0  # of the tokens that are written: far from zero, where a smooth function is nearly linear
_FEWEST = 4  # a, b, a + b and 0
_OFF = 0.1  # what activations rounded to 8 bits are off by is a tenth of this, what a nonlinear function is, several


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a contribution comes from.

    Args:
        path: the last module with a matrix on the way to it; empty if there is none.
        values: the numbers of what lies between that module and the stream, the contribution first.
        projection: what that module reads if it is linear, else why there is no such input.
    """

    path: str
    values: tuple[str, ...]
    projection: Seen | str

    @property
    def passed(self) -> set[str]:
        """The values that belong to the branch from the projection's input on."""
        return {*self.values, *(() if isinstance(self.projection, str) else (self.projection.value,))}


def largest_rank(module: nn.Module) -> int:
    """Return the rank of a module's largest parameter or buffer, 0 without any."""
    # Quantised weights can be buffers; experts hold theirs as one tensor of rank 3.
    return max((tensor.ndim for tensors in (module.parameters(), module.buffers()) for tensor in tensors), default=0)


def origin_of(root: nn.Module, trace: Trace, block: str, term: Seen, additive: Collection[str] | str) -> Origin:
    """Look back from a contribution, through norms and dropouts, to the module that makes it.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        block: path of the block.
        term: the contribution.
        additive: the paths of the modules that are proven to be linear, as `additive_modules` returns them, or the
            reason why none is.
    """
    path, values = _last_matrix(root, trace, block, term)
    inputs = {seen.value: seen for seen in trace.one(path, "input") if seen.is_tokens}
    projection: Seen | str
    if not path:
        projection = f"no linear module gives the output of {term.place.path}"
    elif not _may_be_linear(root.get_submodule(path)):
        projection = f"it is computed inside {path}, not by a linear module of its own"
    elif len(inputs) != 1:
        projection = f"{path} does not read one tensor"
    elif isinstance(additive, str):
        projection = additive
    elif path not in additive:
        projection = f"it is computed inside {path}, which is not linear"
    else:
        projection = next(iter(inputs.values()))
    return Origin(path, values, projection)


def _last_matrix(root: nn.Module, trace: Trace, block: str, term: Seen) -> tuple[str, tuple[str, ...]]:
    """Return the path of the last module with a matrix before a contribution, and the values from there on."""
    values = [term.value]
    for _ in range(_STEPS):
        made = [seen for seen in trace.within(block, "output") if seen.value == values[-1]]
        if not made:
            break
        path = min(made, key=lambda seen: seen.place.order).place.path
        path = _outermost(trace, block, path, values[-1])
        if largest_rank(root.get_submodule(path)) >= 2:
            return path, tuple(values)
        values.append(next((seen.value for seen in trace.one(path, "input") if seen.is_tokens), ""))
    return "", (term.value,)


def _outermost(trace: Trace, block: str, path: str, value: str) -> str:
    """Climb to the module that wraps a linear one with the same input and output, as adapters do."""
    while True:
        parent = path.rpartition(".")[0]
        inside = len(parent) > len(block)
        same = {seen.value for seen in trace.one(parent, "input")} == {seen.value for seen in trace.one(path, "input")}
        if not inside or not same or value not in {seen.value for seen in trace.one(parent, "output")}:
            return path
        path = parent


def _may_be_linear(module: nn.Module) -> bool:
    # An adapted linear module keeps the original one as `base_layer`; that is how PEFT marks all its tuners.
    return "base_layer" in module._modules or (not module._modules and largest_rank(module) == 2)


def additive_modules(subject: Subject, trace: Trace, chain: Chain, sums: Sequence[Sums | str]) -> set[str] | str:
    """Return which of the modules that contributions come out of are linear, by one forward, or why that is not known.

    Tokens a, b, a + b and 0 are written into each of them. A linear module gives ``f(a + b) - f(a) = f(b) - f(0)``; a
    whole feed-forward or attention does not, even where it is one module with one matrix.
    """
    inputs: dict[str, Seen] = {}
    outputs: dict[str, Seen] = {}
    for path, found in zip(chain.paths, sums, strict=True):
        for term in () if isinstance(found, str) else found.terms:
            maker, _ = _last_matrix(subject.root, trace, path, term)
            taken = {seen.value: seen for seen in trace.one(maker, "input") if seen.is_tokens}
            given = [seen for seen in trace.one(maker, "output") if seen.is_tokens]
            if maker and len(taken) == 1 and given and _may_be_linear(subject.root.get_submodule(maker)):
                inputs[maker], outputs[maker] = next(iter(taken.values())), given[0]
    batch, sequence = subject.tokens()
    if not inputs:
        return set()
    if batch * sequence < _FEWEST:
        return (
            f"the probe's inputs hold {batch * sequence} tokens, too few to see whether it comes out of a linear "
            f"module: give resolve(model, inputs=batch) {_FEWEST} or more"
        )
    raw: dict[Slot, Tensor] = {}
    makers: dict[Slot, str] = {}
    edits: dict[Slot, Edit] = {
        slot_at(entry, subject): restore(trace.values[entry.value]) for entry in chain.entries
    }  # else what is written would grow from block to block
    for maker, seen in inputs.items():
        edits[slot_at(seen, subject)] = _sums_of_tokens
        slot = slot_at(outputs[maker], subject)
        makers[slot], edits[slot] = maker, noted(raw, slot)
    forward_blocks(subject, edits)
    return {makers[slot] for slot, given in raw.items() if _is_additive(given)}


def _sums_of_tokens(like: Tensor) -> Tensor:
    """Return equally many tokens a, b and a + b, and then zeros, in the shape ``[B, S, width]`` of what was there."""
    batch, sequence, width = like.shape
    count = batch * sequence // 4
    a, b = torch.randn((2, count, width), generator=torch.Generator().manual_seed(0)).mul(_SIZE).to(like.dtype)
    zeros = torch.zeros((batch * sequence - 3 * count, width), dtype=like.dtype)
    return torch.cat([a, b, a + b, zeros]).view(like.shape).to(like.device)


def _is_additive(given: Tensor) -> bool:
    rows = given.flatten(0, 1).double()
    count = len(rows) // 4
    first, second, both, nothing = (rows[number * count : (number + 1) * count] for number in range(4))
    off = float((both - first - second + nothing).norm())
    return off <= _OFF * float((both - nothing).norm())
