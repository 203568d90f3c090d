"""Find the linear module that computes a contribution, such as `o_proj` or `down_proj`.

1. It is searched backwards from the contribution, through norms and dropouts, to the last module with a matrix.
2. It is proven to be linear in one forward: for tokens a and b it must give ``f(a + b) - f(a) = f(b) - f(0)``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Chain
from .probe import Seen, Subject, Trace
from .roles import forward_blocks, record, restore, slot_at
from .slots import Edit, Slot
from .sums import Sums

_STEPS = 3  # norms and dropouts between a projection and the residual stream
_SIZE = 8.0  # standard deviation of the written tokens: large, as a smooth function is nearly linear around zero
_FEWEST = 4  # a, b, a + b and 0
_OFF = 0.1  # relative error; rounding activations to 8 bits causes a tenth of this, a nonlinear function several times


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a contribution comes from.

    Args:
        path: path of the last module with a matrix before it; empty if there is none.
        values: digests of the values between that module and the stream, the contribution first.
        projection: the input of that module if it is linear, else the reason why there is no such input.
    """

    path: str
    values: tuple[str, ...]
    projection: Seen | str

    @property
    def branch_values(self) -> set[str]:
        """Digests of the values from the projection's input to the contribution."""
        return {*self.values, *(() if isinstance(self.projection, str) else (self.projection.value,))}


def largest_rank(module: nn.Module) -> int:
    """Return the highest rank among a module's parameters and buffers, 0 without any."""
    # Quantised weights can be buffers; experts hold theirs as one tensor of rank 3.
    return max((tensor.ndim for tensors in (module.parameters(), module.buffers()) for tensor in tensors), default=0)


def origin_of(root: nn.Module, trace: Trace, block: str, term: Seen, additive: Collection[str] | str) -> Origin:
    """Search backwards from a contribution, through norms and dropouts, for the module that computes it.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        block: path of the block.
        term: the contribution.
        additive: paths of the modules that are proven to be linear, as `additive_modules` returns them, or the reason
            why that is not known.
    """
    path, values = _last_matrix(root, trace, block, term)
    inputs = {seen.value: seen for seen in trace.one(path, "input") if seen.is_tokens}
    projection: Seen | str
    if not path:
        projection = f"no linear module computes the output of {term.tensor_path.path}"
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
        outputs = [seen for seen in trace.within(block, "output") if seen.value == values[-1]]
        if not outputs:
            break
        path = min(outputs, key=lambda seen: seen.tensor_path.order).tensor_path.path
        path = _outermost(trace, block, path, values[-1])
        if largest_rank(root.get_submodule(path)) >= 2:
            return path, tuple(values)
        values.append(next((seen.value for seen in trace.one(path, "input") if seen.is_tokens), ""))
    return "", (term.value,)


def _outermost(trace: Trace, block: str, path: str, value: str) -> str:
    """Return the outermost module around a linear one that has the same input and output, as adapters have."""
    while True:
        parent = path.rpartition(".")[0]
        inside = len(parent) > len(block)
        same = {seen.value for seen in trace.one(parent, "input")} == {seen.value for seen in trace.one(path, "input")}
        if not inside or not same or value not in {seen.value for seen in trace.one(parent, "output")}:
            return path
        path = parent


def _may_be_linear(module: nn.Module) -> bool:
    # PEFT's tuners hold the original linear module as `base_layer`.
    return "base_layer" in module._modules or (not module._modules and largest_rank(module) == 2)


def additive_modules(subject: Subject, trace: Trace, chain: Chain, sums: Sequence[Sums | str]) -> set[str] | str:
    """Return the paths of the linear modules that compute contributions, by one forward, or why they are not known.

    Tokens a, b, a + b and 0 are written into each candidate. A linear module gives ``f(a + b) - f(a) = f(b) - f(0)``;
    a whole feed-forward or attention does not, even where it is one module with one matrix.
    """
    inputs: dict[str, Seen] = {}
    outputs: dict[str, Seen] = {}
    for path, parts in zip(chain.paths, sums, strict=True):
        for term in () if isinstance(parts, str) else parts.terms:
            producer, _ = _last_matrix(subject.root, trace, path, term)
            reads = {seen.value: seen for seen in trace.one(producer, "input") if seen.is_tokens}
            returns = [seen for seen in trace.one(producer, "output") if seen.is_tokens]
            if producer and len(reads) == 1 and returns and _may_be_linear(subject.root.get_submodule(producer)):
                inputs[producer], outputs[producer] = next(iter(reads.values())), returns[0]
    batch, sequence = subject.tokens()
    if not inputs:
        return set()
    if batch * sequence < _FEWEST:
        return (
            f"the probe's inputs hold {batch * sequence} tokens, too few to see whether a linear module computes it: "
            f"call resolve(model, inputs=batch) with {_FEWEST} tokens or more"
        )
    found: dict[Slot, Tensor] = {}
    producers: dict[Slot, str] = {}
    edits: dict[Slot, Edit] = {
        slot_at(entry, subject): restore(trace.values[entry.value]) for entry in chain.entries
    }  # else the written tokens would grow from block to block
    for producer, seen in inputs.items():
        edits[slot_at(seen, subject)] = _sums_of_tokens
        slot = slot_at(outputs[producer], subject)
        producers[slot], edits[slot] = producer, record(found, slot)
    forward_blocks(subject, edits)
    return {producers[slot] for slot, output in found.items() if _is_additive(output)}


def _sums_of_tokens(like: Tensor) -> Tensor:
    """Return the same number of tokens a, b and a + b, then zeros, in the shape ``[B, S, width]`` of a tensor."""
    batch, sequence, width = like.shape
    count = batch * sequence // 4
    a, b = torch.randn((2, count, width), generator=torch.Generator().manual_seed(0)).mul(_SIZE).to(like.dtype)
    zeros = torch.zeros((batch * sequence - 3 * count, width), dtype=like.dtype)
    return torch.cat([a, b, a + b, zeros]).view(like.shape).to(like.device)


def _is_additive(output: Tensor) -> bool:
    rows = output.flatten(0, 1).double()
    count = len(rows) // 4
    a, b, both, zero = (rows[number * count : (number + 1) * count] for number in range(4))
    error = float((both - a - b + zero).norm())
    return error <= _OFF * float((both - zero).norm())
