"""Find the tensor of each semantic site, within the blocks and before and after them.

Within a block, from its sums and roles: the inputs of attention and feed-forward, the inputs of their last linear maps
(`attn_z`, `mlp_neurons`), their contributions, and the stream between them (`resid_mid`). Outside the blocks: the
outputs of the token embedding and of the final norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import nn

from .blocks import Chain, power_of_two
from .inputs import Branch, sublayer_input
from .probe import Seen, Trace, digest_of, embedding_of
from .projections import largest_rank, origin_of
from .roles import Roles
from .slots import TensorPath
from .sums import Sums


def block_sites(
    root: nn.Module,
    trace: Trace,
    chain: Chain,
    layer: int,
    sums: Sums | str,
    roles: Roles | str,
    additive: Collection[str] | str,
) -> dict[str, TensorPath | str]:
    """Return the tensor path of every semantic site of one block, or the reason why there is none.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        chain: the blocks.
        layer: index of the block among those that ran.
        sums: what the block adds to the stream, or why that is not known.
        roles: the role of each contribution, or why it is not known.
        additive: paths of the modules that are proven to be linear, or why that is not known.
    """
    found: dict[str, TensorPath | str] = {
        "resid_pre": chain.entries[layer].tensor_path,
        "resid_post": chain.exits[layer].tensor_path,
    }
    inner = ("attn_in", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_neurons", "mlp_out")
    if isinstance(sums, str):
        return found | dict.fromkeys(inner, sums)
    if isinstance(roles, str):
        return found | dict.fromkeys(inner, roles)
    path, entry = chain.paths[layer], chain.entries[layer]
    found["resid_mid"] = _resid_mid(trace, path, sums, roles)
    stream = _stream_values(trace, entry, sums, roles)
    for kind, numbers, what, last in (
        ("attn", roles.mixers, "mixes positions", "attn_z"),
        ("mlp", roles.feed_forwards, "acts on each token alone", "mlp_neurons"),
    ):
        if len(numbers) != 1:
            listed = ", ".join(str(sums.terms[number - 1].tensor_path) for number in numbers)
            reason = f"{len(numbers)} contributions ({listed}) have that role" if numbers else f"nothing in it {what}"
            reason = reason if numbers else _hidden_contribution(sums, roles) or reason
            found |= dict.fromkeys((f"{kind}_in", last, f"{kind}_out"), reason)
            continue
        term = sums.terms[numbers[0] - 1]
        found[f"{kind}_out"] = dataclasses.replace(term.tensor_path, scale=sums.scales[numbers[0] - 1])
        if not trace.values[term.value].any():  # zeros do not show which module computed them
            found |= dict.fromkeys((f"{kind}_in", last), _all_zero(f"{term.tensor_path}"))
            continue
        origin = origin_of(root, trace, path, term, additive)
        found[last] = origin.projection if isinstance(origin.projection, str) else origin.projection.tensor_path
        others = tuple(other.tensor_path.path for other in sums.terms if other is not term)
        found[f"{kind}_in"] = sublayer_input(root, trace, Branch(path, entry, term, origin, others, stream))
    return found


def middle_value(trace: Trace, sums: Sums, roles: Roles) -> str:
    """Return the digest of the stream's value between mixers and feed-forwards, empty if there is none.

    Where the stream is normed between them, the value is of the same kind as the block's input and output: the sum
    before the norm if the block norms its input first, else the norm's output.
    """
    first, *second = sums.stages
    if second:
        separate = len(first.terms) == len(roles.mixers) == max(roles.mixers, default=0)
        between = second[0].start if first.norm_input is None else first.goal
        return between.value if separate else ""
    node = first.node_of({0, *roles.mixers})
    if node is None:
        return ""
    goal = trace.values[first.goal.value]
    terms = [trace.values[term.value].reshape(goal.shape) for term in first.terms]
    return digest_of(first.total(trace.values[first.start.value].reshape(goal.shape), terms, node).to(goal.dtype))


def _stream_values(trace: Trace, entry: Seen, sums: Sums, roles: Roles) -> set[str]:
    """Return the digests of all values that the residual stream has within a block."""
    known = [entry, sums.norm_output, *(seen for s in sums.stages for seen in (s.start, s.goal, s.norm_input))]
    middle = middle_value(trace, sums, roles) if roles.mixers and roles.feed_forwards else ""
    return {seen.value for seen in known if seen is not None} | ({middle} if middle else set())


def _all_zero(*tensors: str) -> str:
    return f"{', '.join(tensors)} {'was' if len(tensors) == 1 else 'were'} all zero in the probe"


def _hidden_contribution(sums: Sums, roles: Roles) -> str:
    """Return why a block may have a contribution that the probe could not show, empty if it cannot have one."""
    if sums.zero_modules:
        return _all_zero(*(f"{path}.output" for path in sums.zero_modules))
    unresponsive = ", ".join(str(sums.terms[number - 1].tensor_path) for number in roles.unresponsive)
    return (
        f"the contribution {unresponsive} did not change with the block's input in the probe" if unresponsive else ""
    )


def _resid_mid(trace: Trace, path: str, sums: Sums, roles: Roles) -> TensorPath | str:
    """Find the stream between the mixer and the feed-forward.

    It is the output of the module that returns it, if there is one, else the input of the first module that reads it.
    The block later adds to that same object, so it is written in place to change the residual stream as well.
    """
    if not roles.mixers or not roles.feed_forwards:
        return _hidden_contribution(sums, roles) or "the block has only one kind of contribution"
    value = middle_value(trace, sums, roles)
    if value == sums.stages[0].start.value:
        zeros = _all_zero(*(str(sums.terms[number - 1].tensor_path) for number in roles.mixers))
        return f"{zeros}, so that the stream before and after it is the same"
    if not value:
        return "attention and feed-forward are added together, in parallel"
    outputs = [seen for seen in trace.within(path, "output") if seen.value == value and seen.is_tokens]
    if outputs:
        return max(outputs, key=lambda seen: seen.tensor_path.order).tensor_path
    reads = [seen for seen in trace.within(path, "input") if seen.value == value and seen.is_tokens]
    if not reads and not all(stage.exact for stage in sums.stages):
        return "the scales of the contributions are known only within rounding"
    if not reads:
        return "no module reads it: the feed-forward runs in parallel to attention"
    return dataclasses.replace(min(reads, key=lambda seen: seen.tensor_path.order).tensor_path, in_place=True)


def end_sites(root: nn.Module, trace: Trace, chain: Chain) -> dict[str, TensorPath | str]:
    """Return the tensor paths of `embed` and `final_norm`, or why there is none."""
    embedding = embedding_of(root)
    name = next((path for path, module in root.named_modules() if module is embedding), None)
    outputs = trace.one(name, "output") if name is not None else []
    first = next((seen for seen in outputs if seen.is_tokens), None)
    embed = first.tensor_path if first is not None else "the token embedding did not run exactly once"
    return {"embed": embed, "final_norm": _final_norm(root, trace, chain.exits[-1])}


def _final_norm(root: nn.Module, trace: Trace, last: Seen) -> TensorPath | str:
    """Find the output of the first norm after the blocks: a module without a matrix that changes its input.

    As between blocks, the model may scale the stream by a power of two before it.
    """
    later = [
        seen
        for (_, port), items in trace.seen.items()
        for seen in items
        if port == "input" and seen.tensor_path.order > last.tensor_path.order and seen.is_tokens
    ]
    readers = {seen.tensor_path.path: seen.tensor_path.order for seen in later if seen.value == last.value}
    if not readers:
        wide = (seen for seen in later if seen.tensor_path.width == last.tensor_path.width)
        readers = {
            seen.tensor_path.path: seen.tensor_path.order
            for seen in wide
            if power_of_two(trace, last, seen) is not None
        }
    for path in sorted(readers, key=lambda path: readers[path]):
        outputs = [seen for seen in trace.one(path, "output") if seen.is_tokens]
        changed = (
            bool(outputs) and outputs[0].tensor_path.width == last.tensor_path.width and outputs[0].value != last.value
        )
        if changed and largest_rank(root.get_submodule(path)) < 2:  # a prediction head reads it too, but has a matrix
            return outputs[0].tensor_path
    producers = {
        path
        for (path, port), items in trace.seen.items()
        for seen in items
        if port == "output" and seen.value == last.value and path and last.value not in _values(trace, path, "input")
    }
    if any(largest_rank(root.get_submodule(path)) < 2 for path in producers):
        return "the last block's output is normed already, and no other norm reads it"
    return "no norm reads the last block's output"


def _values(trace: Trace, path: str, port: str) -> set[str]:
    return {seen.value for seen in trace.one(path, port)}
