"""Prove that what is written at a site is what the model goes on with, for all sites in six forwards.

1. Every site replaced by itself leaves the logits as they are, bit for bit.
2. With noise at all sites of the residual stream at once, every block still adds up from exactly what was written.
3. to 6. With the stream and all contributions held at their recorded values, noise at one kind of site inside the
   branches changes the branches' contributions and nothing else of the stream; noise at the two ends changes what
   follows them. One kind at a time, as what is written at one could make up for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Seen, Subject, Trace, run, trace
from .roles import Roles, forward, forward_blocks, noise, noted, restore, slot_at
from .site import Site
from .slots import Edit, Slot, TensorPath
from .sums import Sums, Tree, agrees

STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The sites whose values add up to the residual stream."""

Slots = Mapping[Site, Slot]
_BRANCHES = {"attn_z": "mixers", "attn_in": "mixers", "mlp_neurons": "feeders", "mlp_in": "feeders"}


@dataclass(frozen=True, slots=True)
class Proven:
    """What the earlier steps established, against which writes are tested."""

    subject: Subject
    trace: Trace
    chain: Chain
    sums: Sequence[Sums | str]
    roles: Sequence[Roles | str]

    def parts(self, site: Site) -> tuple[Sums | str, Roles | str]:
        """Return the sums and roles of the block that a site is in."""
        assert site.layer is not None
        index = self.chain.layers.index(site.layer)
        return self.sums[index], self.roles[index]


@dataclass(slots=True)
class _Noise:
    """Edits that add noise, and what they found before."""

    raw: dict[Site, Tensor] = field(default_factory=dict)

    def edit(self, site: Site, slot: Slot) -> Edit:
        def add(value: Tensor) -> Tensor:
            self.raw[site] = value.detach().to("cpu", copy=True)
            return value + noise(value, slot.order)

        return add


def failing_writes(proven: Proven, slots: Slots) -> dict[Site, str]:
    """Return the sites at which a write does not do what it must, each with the reason.

    Args:
        proven: the model, its recorded forward, blocks, sums and roles.
        slots: all sites to test.
    """
    failing = _not_neutral(proven, slots)
    for test in (_not_added_up, _not_felt):
        failing |= test(proven, {site: slot for site, slot in slots.items() if site not in failing})
    return failing


def _by_name(sites: Iterable[Site]) -> dict[str, list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.name, []).append(site)
    return groups


def _not_neutral(proven: Proven, slots: Slots) -> dict[Site, str]:
    """Replace every site by an equal copy; if that moves the logits, find out at which kind of site."""
    clean = proven.trace.output
    assert clean is not None
    again = clean

    def moves(some: Iterable[Site]) -> bool:
        logits = forward(proven.subject, {slots[site]: torch.clone for site in some})
        if torch.equal(logits, clean):
            return False
        return float((logits - again).abs().max()) > 2 * float((again - clean).abs().max())

    if not moves(slots):
        return {}
    again = run(proven.subject)  # kernels that add in a random order differ between equal forwards: allow as much
    reason = "replacing it by an equal tensor changed the logits"
    groups = _by_name(slots).values()
    return {site: reason for sites in groups if moves(sites) for site in sites}


def _not_added_up(proven: Proven, slots: Slots) -> dict[Site, str]:
    """Write noise at the sites of the stream; if a block does not add up, find out at which kind of site."""
    groups = {name: sites for name, sites in _by_name(slots).items() if name in STREAM}
    if not _broken(proven, slots, [site for sites in groups.values() for site in sites]):
        return {}
    failing: dict[Site, str] = {}
    for sites in groups.values():
        broken = _broken(proven, slots, sites)
        failing |= {
            site: "a value written there did not reach the residual stream" for site in sites if site.layer in broken
        }
    return failing


def _broken(proven: Proven, slots: Slots, sites: Sequence[Site]) -> set[int]:
    """Write noise at some sites and return the layers whose output is not the sum of what was written."""
    added = _Noise()
    chain, subject = proven.chain, proven.subject
    stages = [stage for found in proven.sums if not isinstance(found, str) for stage in found.stages]
    watched = [*chain.entries, *chain.exits, *(term for stage in stages for term in stage.terms)]
    watched += [seen for stage in stages for seen in (stage.start, stage.goal, stage.read) if seen is not None]
    watched += [found.closing for found in proven.sums if not isinstance(found, str) and found.closing is not None]
    handles = []
    before: dict[TensorPath, Tensor] = {}
    paths = {seen.place.path for seen in watched} | {slots[site].place.path for site in sites}
    try:
        for site in sites:
            handles.append(slots[site].register(added.edit(site, slots[site]), subject.tokens))
        for seen in {seen.place: seen for seen in (*chain.entries, *chain.exits, *(s.goal for s in stages))}.values():
            handles.append(slot_at(seen, subject).register(_note(before, seen.place), subject.tokens))
        written = trace(subject, only=paths)
    finally:
        for handle in handles:
            handle.remove()
    broken = set()
    for index, layer in enumerate(chain.layers):
        left = _value(written, chain.exits[index])
        passed_on = True
        if index < len(chain.factors):
            following = before[chain.entries[index + 1].place]
            passed_on = left is not None and torch.equal(
                following, left.reshape(following.shape) * chain.factors[index]
            )
        if not passed_on or not _adds_up(proven, written, slots, sites, index, before):
            broken.add(layer)
    return broken


def _note(notes: dict[TensorPath, Tensor], place: TensorPath) -> Callable[[Tensor], None]:
    def edit(value: Tensor) -> None:
        notes[place] = value.detach().to("cpu", copy=True)

    return edit


def _value(written: Trace, seen: Seen) -> Tensor | None:
    """Return what was at a place in another forward."""
    return _placed(written, seen.place)


def _placed(written: Trace, place: TensorPath) -> Tensor | None:
    found = (item for item in written.one(place.path, place.port) if item.place.keys == place.keys)
    return next((written.values[item.value] for item in found), None)


def _adds_up(
    proven: Proven,
    written: Trace,
    slots: Slots,
    sites: Sequence[Site],
    index: int,
    before: Mapping[TensorPath, Tensor],
) -> bool:
    """Whether one block's output, before any write to it, is the sum of what was written into the block."""
    chain, sums = proven.chain, proven.sums[index]
    leave = before[chain.exits[index].place]
    entry = _value(written, chain.entries[index])
    if entry is None:
        return False
    if isinstance(sums, str):  # nothing known of the inside: the change at the entry must arrive at the exit
        clean = proven.trace.values[chain.exits[index].value]
        unmoved = torch.equal(leave, clean.reshape(leave.shape))
        return Site("resid_pre", chain.layers[index]) not in sites or not unmoved
    stream: Tensor | None = entry
    for stage in sums.stages:
        given = _given(proven, written, slots, sites, index) if len(sums.stages) == 1 else {}
        start = _value(written, stage.start)
        taken = start if stage.read is None else _value(written, stage.read)
        terms = [_value(written, term) for term in stage.terms]
        if given is None or stream is None or start is None or taken is None or any(term is None for term in terms):
            return False
        goal = before[stage.goal.place]
        parts = [part.reshape(goal.shape) for part in (start, *terms) if part is not None]
        if not torch.equal(taken.reshape(stream.shape), stream):
            return False
        if not agrees(stage, stage.total(parts[0], parts[1:], given=given), goal, parts):
            return False
        stream = _value(written, stage.goal)
    closing = None if sums.closing is None else _value(written, sums.closing)
    if sums.closing is None or sums.closing.place == chain.exits[index].place:
        return True
    return closing is not None and torch.equal(closing.reshape(leave.shape), leave)


def _given(
    proven: Proven, written: Trace, slots: Slots, sites: Sequence[Site], index: int
) -> dict[Tree, Tensor] | None:
    """Return what was written to the middle of a block as one sum, or None where that cannot be told."""
    sums, roles = proven.sums[index], proven.roles[index]
    middle = Site("resid_mid", proven.chain.layers[index])
    if middle not in sites or isinstance(roles, str) or isinstance(sums, str):
        return {}
    node = sums.stages[0].node_of({0, *roles.mixers})
    value = _placed(written, slots[middle].place)
    if node is None or value is None:
        return None
    return {node: value.reshape(proven.trace.values[sums.stages[0].goal.value].shape)}


def _not_felt(proven: Proven, slots: Slots) -> dict[Site, str]:
    """Hold the stream at its recorded values and write noise into the branches and the ends."""
    chain = proven.chain
    last = max((site.layer for site in slots if site.layer is not None), default=0)
    rounds = (("attn_z", "resid_post"), ("attn_in", "final_norm", "embed"), ("mlp_neurons",), ("mlp_in",))
    failing: dict[Site, str] = {}
    for names in rounds:
        noisy = [site for site in slots if site.name in names and (site.name != "resid_post" or site.layer == last)]
        if not noisy:
            continue
        added, raw = _Noise(), dict[Slot, Tensor]()
        edits: dict[Slot, Edit] = {slots[site]: added.edit(site, slots[site]) for site in noisy}
        entries = [slot_at(entry, proven.subject) for entry in proven.chain.entries]
        for slot, entry in zip(entries, proven.chain.entries, strict=True):
            edits[slot] = restore(proven.trace.values[entry.value], raw, slot)
        terms: dict[str, Slot] = {}
        for found in proven.sums:
            for term in () if isinstance(found, str) else found.terms:
                slot = terms[str(term.place)] = slot_at(term, proven.subject)
                edits[slot] = restore(proven.trace.values[term.value], raw, slot)
        leaves = {
            layer: slot_at(leave, proven.subject) for layer, leave in zip(chain.layers, chain.exits, strict=True)
        }
        for slot in leaves.values():  # the last hook runs first, before any noise at the block's output
            edits[slot] = noted(raw, slot)
        logits: Tensor | None = None
        if any(site.name in ("resid_post", "final_norm") for site in noisy):
            logits = forward(proven.subject, edits)
        else:
            forward_blocks(proven.subject, edits)
        before: Tensor | None
        for site in noisy:
            if site.name == "embed":
                before, after = proven.trace.values[proven.chain.entries[0].value], raw[entries[0]]
            elif site.layer is None or site.name == "resid_post":
                assert logits is not None
                before, after = proven.trace.output, logits
            else:
                before, after = _contribution(proven, site, terms, raw)
                left = proven.trace.values[chain.exits[chain.layers.index(site.layer)].value]
                if not torch.equal(left.reshape(raw[leaves[site.layer]].shape), raw[leaves[site.layer]]):
                    failing[site] = "a value written there also reached the residual stream beside the contribution"
            if before is None or torch.equal(before.reshape(after.shape), after):
                failing[site] = "a value written there had no effect"
    return failing


def _contribution(
    proven: Proven, site: Site, terms: Mapping[str, Slot], raw: Mapping[Slot, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the recorded contribution of the branch that a site is in, and what became of it."""
    sums, roles = proven.parts(site)
    assert not isinstance(sums, str) and not isinstance(roles, str)  # the site would not have been offered
    numbers = roles.mixers if _BRANCHES[site.name] == "mixers" else roles.feeders
    term = sums.terms[numbers[0] - 1]
    return proven.trace.values[term.value], raw[terms[str(term.place)]]
