"""Places within and around the blocks: what mixers and feed-forwards read, their last inner tensors, and the ends."""

from __future__ import annotations

import dataclasses

from torch import nn

from .blocks import Chain
from .probe import Seen, Trace, embedding_of, number_of
from .roles import Roles
from .slots import Place
from .sums import Sums

_STEPS = 3  # norms and dropouts between a projection and the residual stream


def block_places(
    root: nn.Module, trace: Trace, chain: Chain, layer: int, sums: Sums | str, roles: Roles | None
) -> dict[str, Place | str]:
    """Return, for every semantic name of one block, its place or the reason why there is none."""
    places: dict[str, Place | str] = {
        "resid_pre": chain.entries[layer].place,
        "resid_post": chain.exits[layer].place,
    }
    inner = ("attn_in", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_neurons", "mlp_out")
    if isinstance(sums, str):
        return places | dict.fromkeys(inner, sums)
    if roles is None:
        return places | dict.fromkeys(inner, "a contribution does not react to the block's input")
    path = chain.paths[layer]
    places["resid_mid"] = _resid_mid(trace, path, sums, roles)
    for kind, numbers, what, last in (
        ("attn", roles.mixers, "mixes positions", "attn_z"),
        ("mlp", roles.feeders, "acts on each token alone", "mlp_neurons"),
    ):
        if len(numbers) != 1:
            where = ", ".join(str(sums.terms[number - 1].place) for number in numbers)
            reason = f"{len(numbers)} contributions ({where}) have that role" if numbers else f"nothing in it {what}"
            places |= dict.fromkeys((f"{kind}_in", last, f"{kind}_out"), reason)
            continue
        term = sums.terms[numbers[0] - 1]
        places[f"{kind}_out"] = dataclasses.replace(term.place, scale=sums.scales[numbers[0] - 1])
        projection = find_projection(root, trace, path, term)
        places[last] = projection if isinstance(projection, str) else projection.place
        others = [other.place.path for other in sums.terms if other is not term]
        places[f"{kind}_in"] = _read_by(trace, chain.entries[layer], path, term, projection, others)
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


def _resid_mid(trace: Trace, path: str, sums: Sums, roles: Roles) -> Place | str:
    """Find the stream between the mixer and the feed-forward.

    Where a module gives it, that output is the place. Else it is the input of the first module that reads it; the
    block adds to the very same object later, so a write must go into the tensor to reach the residual stream too.
    """
    if not roles.mixers or not roles.feeders:
        return "the block has only one kind of contribution"
    number = middle_of(trace, sums, roles)
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


def find_projection(root: nn.Module, trace: Trace, block: str, term: Seen) -> Seen | str:
    """Return the input of the linear module that makes a contribution, looking back through norms and dropouts."""
    value = term.value
    for _ in range(_STEPS):
        made = [seen for seen in trace.within(block, "output") if seen.value == value]
        if not made:
            break
        path = min(made, key=lambda seen: seen.place.order).place.path
        path = _outermost(trace, block, path, value)
        module = root.get_submodule(path)
        inputs = {seen.value: seen for seen in trace.one(path, "input") if seen.is_tokens}
        if _is_linear(module):
            return next(iter(inputs.values())) if len(inputs) == 1 else f"{path} does not read one tensor"
        if largest_rank(module) >= 2:
            return f"it is computed inside {path}, not by a linear module of its own"
        value = next(iter(inputs), "")
    return f"no linear module gives the output of {term.place.path}"


def _outermost(trace: Trace, block: str, path: str, value: str) -> str:
    """Climb to the module that wraps a linear one with the same input and output, as adapters do."""
    while True:
        parent = path.rpartition(".")[0]
        inside = len(parent) > len(block)
        same = {seen.value for seen in trace.one(parent, "input")} == {seen.value for seen in trace.one(path, "input")}
        if not inside or not same or value not in {seen.value for seen in trace.one(parent, "output")}:
            return path
        path = parent


def _is_linear(module: nn.Module) -> bool:
    # An adapted linear module keeps the original one as `base_layer`; that is how PEFT marks all its tuners.
    return "base_layer" in module._modules or (not module._modules and largest_rank(module) == 2)


def largest_rank(module: nn.Module) -> int:
    """Return the rank of a module's largest parameter or buffer, 0 without any."""
    # Quantised weights can be buffers; experts hold theirs as one tensor of rank 3.
    return max((tensor.ndim for tensors in (module.parameters(), module.buffers()) for tensor in tensors), default=0)


def _read_by(
    trace: Trace, entry: Seen, block: str, term: Seen, projection: Seen | str, others: list[str]
) -> Place | str:
    """Return what the module reads that makes a contribution: its first input that another module in the block gave.

    The module is the outermost one below the block that holds the projection and no other contribution.
    """
    maker = term.place.path if isinstance(projection, str) else projection.place.path
    steps = maker[len(block) + 1 :].split(".")
    for count in range(1, len(steps) + 1):
        path = ".".join((block, *steps[:count]))
        if trace.calls.get(path) == 1 and not any(other == path or other.startswith(f"{path}.") for other in others):
            break
    else:
        return "no module of the block holds it alone"
    if not isinstance(projection, str) and path == projection.place.path:
        return f"the block calls {path} and what comes before it one by one"
    given = {entry.value} | {seen.value for seen in trace.within(block, "output")}
    width = entry.place.width
    inputs = [seen for seen in trace.one(path, "input") if seen.is_tokens and seen.place.width == width]
    known = [seen for seen in inputs if seen.value in given] or inputs
    return known[0].place if known else f"{path} reads no tensor of the residual stream's width"


def end_places(root: nn.Module, trace: Trace, chain: Chain) -> dict[str, Place | str]:
    """Return the places of the token embedding's output and of the final norm's output, or why there is none."""
    places: dict[str, Place | str] = {}
    embedding = embedding_of(root)
    name = next((path for path, module in root.named_modules() if module is embedding), None)
    outputs = trace.one(name, "output") if name is not None else []
    first = next((seen for seen in outputs if seen.is_tokens), None)
    places["embed"] = first.place if first is not None else "the token embedding did not run exactly once"
    last = chain.exits[-1]
    readers = [
        seen.place
        for (path, port), items in trace.seen.items()
        for seen in items
        if port == "input"
        and seen.value == last.value
        and seen.place.order > last.place.order
        and trace.calls[path] == 1
    ]
    places["final_norm"] = "no module reads the last block's output and gives a tensor of its shape"
    for reader in sorted(readers, key=lambda place: place.order):
        given = [seen for seen in trace.one(reader.path, "output") if seen.is_tokens]
        if given and given[0].place.width == last.place.width:
            places["final_norm"] = given[0].place
            break
    return places
