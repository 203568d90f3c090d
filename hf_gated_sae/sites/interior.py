"""Places within and around the blocks: what mixers and feed-forwards read, their last inner tensors, and the ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import nn

from .blocks import Chain, power_of_two
from .inputs import Branch, read_by
from .probe import Seen, Trace, embedding_of, number_of
from .projections import largest_rank, origin_of
from .roles import Roles
from .slots import TensorPath
from .sums import Sums


def block_places(
    root: nn.Module,
    trace: Trace,
    chain: Chain,
    layer: int,
    sums: Sums | str,
    roles: Roles | str,
    additive: Collection[str] | str,
) -> dict[str, TensorPath | str]:
    """Return, for every semantic name of one block, its place or the reason why there is none.

    Args:
        root: the model without wrappers.
        trace: one recorded forward.
        chain: the blocks.
        layer: which of them, counted among those that ran.
        sums: what it adds to the stream, or why that is not known.
        roles: which contribution is what, or why that is not known.
        additive: the paths of the modules that are proven to be linear, or why none is.
    """
    places: dict[str, TensorPath | str] = {
        "resid_pre": chain.entries[layer].place,
        "resid_post": chain.exits[layer].place,
    }
    inner = ("attn_in", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_neurons", "mlp_out")
    if isinstance(sums, str):
        return places | dict.fromkeys(inner, sums)
    if isinstance(roles, str):
        return places | dict.fromkeys(inner, roles)
    path, entry = chain.paths[layer], chain.entries[layer]
    places["resid_mid"] = _resid_mid(trace, path, sums, roles)
    stream = _stream_values(trace, entry, sums, roles)
    for kind, numbers, what, last in (
        ("attn", roles.mixers, "mixes positions", "attn_z"),
        ("mlp", roles.feeders, "acts on each token alone", "mlp_neurons"),
    ):
        if len(numbers) != 1:
            where = ", ".join(str(sums.terms[number - 1].place) for number in numbers)
            reason = f"{len(numbers)} contributions ({where}) have that role" if numbers else f"nothing in it {what}"
            reason = reason if numbers else _unseen(sums, roles) or reason
            places |= dict.fromkeys((f"{kind}_in", last, f"{kind}_out"), reason)
            continue
        term = sums.terms[numbers[0] - 1]
        places[f"{kind}_out"] = dataclasses.replace(term.place, scale=sums.scales[numbers[0] - 1])
        if not trace.values[term.value].any():  # then it does not show what it is made of
            places |= dict.fromkeys((f"{kind}_in", last), _zeros(f"{term.place}"))
            continue
        origin = origin_of(root, trace, path, term, additive)
        places[last] = origin.projection if isinstance(origin.projection, str) else origin.projection.place
        others = tuple(other.place.path for other in sums.terms if other is not term)
        places[f"{kind}_in"] = read_by(root, trace, Branch(path, entry, term, origin, others, stream))
    return places


def middle_of(trace: Trace, sums: Sums, roles: Roles) -> str:
    """Return the number of the value that the stream has between mixers and feed-forwards, empty if there is none.

    Where the stream is normed in between, it is what the block's ends are: sums if the block norms the stream that it
    is given, as the next sum does with this one, else what the norms after the sums give.
    """
    first, *second = sums.stages
    if second:
        apart = len(first.terms) == len(roles.mixers) == max(roles.mixers, default=0)
        between = second[0].start if first.read is None else first.goal
        return between.value if apart else ""
    node = first.node_of({0, *roles.mixers})
    if node is None:
        return ""
    goal = trace.values[first.goal.value]
    terms = [trace.values[term.value].reshape(goal.shape) for term in first.terms]
    return number_of(first.total(trace.values[first.start.value].reshape(goal.shape), terms, node).to(goal.dtype))


def _stream_values(trace: Trace, entry: Seen, sums: Sums, roles: Roles) -> set[str]:
    """Return the numbers of all that the residual stream is within a block."""
    known = [entry, sums.closing, *(seen for s in sums.stages for seen in (s.start, s.goal, s.read))]
    middle = middle_of(trace, sums, roles) if roles.mixers and roles.feeders else ""
    return {seen.value for seen in known if seen is not None} | ({middle} if middle else set())


def _zeros(*what: str) -> str:
    return f"{', '.join(what)} gave only zeros in the probe"


def _unseen(sums: Sums, roles: Roles) -> str:
    """Return why a block may have a contribution of which the probe showed nothing, empty if it has none."""
    if sums.silent:
        return _zeros(*sums.silent)
    still = ", ".join(str(sums.terms[number - 1].place) for number in roles.still)
    return f"the contribution {still} did not react to the block's input in the probe" if still else ""


def _resid_mid(trace: Trace, path: str, sums: Sums, roles: Roles) -> TensorPath | str:
    """Find the stream between the mixer and the feed-forward.

    Where a module gives it, that output is the place. Else it is the input of the first module that reads it; the
    block adds to the very same object later, so a write must go into the tensor to reach the residual stream too.
    """
    if not roles.mixers or not roles.feeders:
        return _unseen(sums, roles) or "the block has only one kind of contribution"
    number = middle_of(trace, sums, roles)
    if number == sums.stages[0].start.value:
        zeros = _zeros(*(str(sums.terms[number - 1].place) for number in roles.mixers))
        return f"{zeros}, so that the stream before and after it cannot be told apart"
    if not number:
        return "attention and feed-forward are added together, in parallel"
    given = [seen for seen in trace.within(path, "output") if seen.value == number and seen.is_tokens]
    if given:
        return max(given, key=lambda seen: seen.place.order).place
    taken = [seen for seen in trace.within(path, "input") if seen.value == number and seen.is_tokens]
    if not taken and not all(stage.exact for stage in sums.stages):
        return "the scales of the contributions are known only within rounding"
    if not taken:
        return "no module reads it: the feed-forward runs in parallel to attention"
    return dataclasses.replace(min(taken, key=lambda seen: seen.place.order).place, in_place=True)


def end_places(root: nn.Module, trace: Trace, chain: Chain) -> dict[str, TensorPath | str]:
    """Return the places of the token embedding's output and of the final norm's output, or why there is none."""
    embedding = embedding_of(root)
    name = next((path for path, module in root.named_modules() if module is embedding), None)
    outputs = trace.one(name, "output") if name is not None else []
    first = next((seen for seen in outputs if seen.is_tokens), None)
    embed = first.place if first is not None else "the token embedding did not run exactly once"
    return {"embed": embed, "final_norm": _final_norm(root, trace, chain.exits[-1])}


def _final_norm(root: nn.Module, trace: Trace, last: Seen) -> TensorPath | str:
    """Find what the first norm after the blocks gives: a module without a matrix that changes what it reads.

    As between blocks, the model may scale the stream by a power of two before it.
    """
    later = [
        seen
        for (_, port), items in trace.seen.items()
        for seen in items
        if port == "input" and seen.place.order > last.place.order and seen.is_tokens
    ]
    readers = {seen.place.path: seen.place.order for seen in later if seen.value == last.value}
    if not readers:
        wide = (seen for seen in later if seen.place.width == last.place.width)
        readers = {seen.place.path: seen.place.order for seen in wide if power_of_two(trace, last, seen) is not None}
    for path in sorted(readers, key=lambda path: readers[path]):
        given = [seen for seen in trace.one(path, "output") if seen.is_tokens]
        alike = bool(given) and given[0].place.width == last.place.width and given[0].value != last.value
        if alike and largest_rank(root.get_submodule(path)) < 2:  # a prediction head may read it, too, and is none
            return given[0].place
    makers = {
        path
        for (path, port), items in trace.seen.items()
        for seen in items
        if port == "output" and seen.value == last.value and path and last.value not in _values(trace, path, "input")
    }
    if any(largest_rank(root.get_submodule(path)) < 2 for path in makers):
        return "the last block's output is normed already, and no other norm reads it"
    return "no norm reads the last block's output"


def _values(trace: Trace, path: str, port: str) -> set[str]:
    return {seen.value for seen in trace.one(path, port)}
