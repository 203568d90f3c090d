"""Prove that what is written at a site is what the model goes on with, for all sites in four forwards.

1. Every site replaced by itself leaves the logits as they are, bit for bit.
2. With noise at all sites of the residual stream at once, every block still adds up from exactly what was written.
3. and 4. With the stream held at its recorded values, noise inside one branch changes that branch's contribution;
   noise at the two ends changes what follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Seen, Subject, Trace, run, trace
from .roles import Roles, forward, noise, restore, slot_at
from .site import Site
from .slots import Edit, Slot
from .sums import Decomposition, agrees

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
    sums: Sequence[Decomposition | str]
    roles: Sequence[Roles | None]


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
    watched = [*chain.entries, *chain.exits]
    watched += [term for found in proven.sums if not isinstance(found, str) for term in found.terms]
    handles = []
    leaves: dict[int, Tensor] = {}
    entries: dict[int, Tensor] = {}
    paths = {seen.place.path for seen in watched} | {slots[site].place.path for site in sites}
    try:
        for site in sites:
            handles.append(slots[site].register(added.edit(site, slots[site]), subject.tokens))
        for layer, (entry, leave) in enumerate(zip(chain.entries, chain.exits, strict=True)):
            handles.append(slot_at(entry, subject).register(_note(entries, layer), subject.tokens))
            handles.append(slot_at(leave, subject).register(_note(leaves, layer), subject.tokens))
        written = trace(subject, only=paths)
    finally:
        for handle in handles:
            handle.remove()
    broken = set()
    for layer in range(len(chain.paths)):
        next_entry = entries.get(layer + 1)
        left = _value(written, chain.exits[layer])
        passed_on = next_entry is None or (
            left is not None and torch.equal(next_entry, left.reshape(next_entry.shape))
        )
        if not passed_on or not _adds_up(proven, written, slots, sites, layer, leaves[layer]):
            broken.add(layer)
    return broken


def _note(notes: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def edit(value: Tensor) -> None:
        notes[layer] = value.detach().to("cpu", copy=True)

    return edit


def _value(written: Trace, seen: Seen) -> Tensor | None:
    """Return what was at a place in another forward."""
    found = (item for item in written.one(seen.place.path, seen.place.port) if item.place.keys == seen.place.keys)
    return next((written.values[item.value] for item in found), None)


def _adds_up(proven: Proven, written: Trace, slots: Slots, sites: Sequence[Site], layer: int, leave: Tensor) -> bool:
    """Whether one block's output, before any write to it, is the sum of what was written into the block."""
    sums, roles = proven.sums[layer], proven.roles[layer]
    entry = _value(written, proven.chain.entries[layer])
    if entry is None:
        return False
    if isinstance(sums, str):  # nothing known of the inside: the change at the entry must arrive at the exit
        clean = proven.trace.values[proven.chain.exits[layer].value]
        return Site("resid_pre", layer) not in sites or not torch.equal(leave, clean.reshape(leave.shape))
    terms = [_value(written, term) for term in sums.terms]
    parts = [part.reshape(leave.shape) for part in (entry, *terms) if part is not None]
    if len(parts) <= len(terms):
        return False
    middle = Site("resid_mid", layer)
    given = {}
    if middle in sites and roles is not None:
        node = sums.node_of({0, *roles.mixers})
        place = slots[middle].place
        value = next((s.value for s in written.one(place.path, place.port) if s.place.keys == place.keys), None)
        if node is None or value is None:
            return False
        given[node] = written.values[value].reshape(leave.shape)
    return agrees(sums, sums.total(parts[0], parts[1:], given=given), leave, parts)


def _not_felt(proven: Proven, slots: Slots) -> dict[Site, str]:
    """Hold the stream at its recorded values and write noise into the branches and the ends."""
    last = max((site.layer for site in slots if site.layer is not None), default=0)
    rounds = (("attn_z", "mlp_neurons", "resid_post"), ("attn_in", "mlp_in", "final_norm", "embed"))
    failing: dict[Site, str] = {}
    for names in rounds:
        noisy = [site for site in slots if site.name in names and (site.name != "resid_post" or site.layer == last)]
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
        logits = forward(proven.subject, edits)
        for site in noisy:
            if site.layer is None or site.name == "resid_post":
                before, after = proven.trace.output, logits
                if site.name == "embed":
                    before, after = proven.trace.values[proven.chain.entries[0].value], raw[entries[0]]
            else:
                before, after = _contribution(proven, site, terms, raw)
            if before is None or torch.equal(before.reshape(after.shape), after):
                failing[site] = "a value written there had no effect"
    return failing


def _contribution(
    proven: Proven, site: Site, terms: Mapping[str, Slot], raw: Mapping[Slot, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the recorded contribution of the branch that a site is in, and what became of it."""
    assert site.layer is not None
    sums, roles = proven.sums[site.layer], proven.roles[site.layer]
    assert not isinstance(sums, str) and roles is not None  # the site would not have been offered
    numbers = roles.mixers if _BRANCHES[site.name] == "mixers" else roles.feeders
    term = sums.terms[numbers[0] - 1]
    return proven.trace.values[term.value], raw[terms[str(term.place)]]
