"""Prove that the model continues with what is written at a site: all sites, in six forwards.

1. Every site is replaced by an equal copy: the logits must not change in any bit.
2. Noise is written at all sites of the residual stream: every block's output must be the sum of the written values.
3. to 6. The stream and all contributions are held at their recorded values, and noise is written at one kind of site
   inside the branches: it must change that branch's contribution and nothing else in the stream. Noise at the first
   and last sites must change what follows them. Each forward takes one kind, so that edits cannot cancel each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Subject, Trace, run, trace
from .roles import Roles, forward, forward_blocks, noise, record, restore, slot_at
from .site import Site
from .slots import Edit, Slot, TensorPath
from .sums import Sums, Tree, agrees

STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The sites whose values add up to the residual stream."""

Slots = Mapping[Site, Slot]
_BRANCHES = {"attn_z": "mixers", "attn_in": "mixers", "mlp_neurons": "feed_forwards", "mlp_in": "feed_forwards"}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe established before any write is tested: the forward, the blocks, their sums and roles."""

    subject: Subject
    trace: Trace
    chain: Chain
    sums: Sequence[Sums | str]
    roles: Sequence[Roles | str]

    def block_of(self, site: Site) -> tuple[Sums | str, Roles | str]:
        """Return the sums and roles of the block that a site is in."""
        assert site.layer is not None
        index = self.chain.layers.index(site.layer)
        return self.sums[index], self.roles[index]


@dataclass(slots=True)
class _Noise:
    """Edits that add noise; `before` records the values that they replace."""

    before: dict[Site, Tensor] = field(default_factory=dict)

    def edit(self, site: Site, slot: Slot) -> Edit:
        def add(value: Tensor) -> Tensor:
            self.before[site] = value.detach().to("cpu", copy=True)
            return value + noise(value, slot.order)

        return add


def failing_writes(probed: ProbeResult, slots: Slots) -> dict[Site, str]:
    """Return the sites at which a write does not have the effect that it must have, each with the reason.

    Args:
        probed: the model, its recorded forward, blocks, sums and roles.
        slots: all sites to test.
    """
    failing = _failing_identity(probed, slots)
    for test in (_failing_sums, _failing_effects):
        failing |= test(probed, {site: slot for site, slot in slots.items() if site not in failing})
    return failing


def _by_name(sites: Iterable[Site]) -> dict[str, list[Site]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.name, []).append(site)
    return groups


def _failing_identity(probed: ProbeResult, slots: Slots) -> dict[Site, str]:
    """Replace every site by an equal copy; if the logits change, find the kinds of site that change them."""
    clean = probed.trace.output
    assert clean is not None
    again = clean

    def changes_logits(some: Iterable[Site]) -> bool:
        logits = forward(probed.subject, {slots[site]: torch.clone for site in some})
        if torch.equal(logits, clean):
            return False
        return float((logits - again).abs().max()) > 2 * float((again - clean).abs().max())

    if not changes_logits(slots):
        return {}
    # Kernels that add in a random order differ between equal forwards: allow twice that difference.
    again = run(probed.subject)
    reason = "replacing it by an equal tensor changed the logits"
    groups = _by_name(slots).values()
    return {site: reason for sites in groups if changes_logits(sites) for site in sites}


def _failing_sums(probed: ProbeResult, slots: Slots) -> dict[Site, str]:
    """Write noise at the sites of the stream; if a block's sum does not hold, find the kinds of site that break it."""
    groups = {name: sites for name, sites in _by_name(slots).items() if name in STREAM}
    if not _layers_with_wrong_sum(probed, slots, [site for sites in groups.values() for site in sites]):
        return {}
    failing: dict[Site, str] = {}
    for sites in groups.values():
        wrong = _layers_with_wrong_sum(probed, slots, sites)
        failing |= {
            site: "a value written there did not reach the residual stream" for site in sites if site.layer in wrong
        }
    return failing


def _layers_with_wrong_sum(probed: ProbeResult, slots: Slots, sites: Sequence[Site]) -> set[int]:
    """Write noise at some sites and return the layers whose output is not the sum of what was written."""
    added = _Noise()
    chain, subject = probed.chain, probed.subject
    stages = [stage for sums in probed.sums if not isinstance(sums, str) for stage in sums.stages]
    watched = [*chain.entries, *chain.exits, *(term for stage in stages for term in stage.terms)]
    watched += [seen for stage in stages for seen in (stage.start, stage.goal, stage.norm_input) if seen is not None]
    watched += [sums.norm_output for sums in probed.sums if not isinstance(sums, str) and sums.norm_output is not None]
    handles = []
    before: dict[TensorPath, Tensor] = {}
    paths = {seen.tensor_path.path for seen in watched} | {slots[site].tensor_path.path for site in sites}
    try:
        for site in sites:
            handles.append(slots[site].register(added.edit(site, slots[site]), subject.tokens))
        for seen in {
            seen.tensor_path: seen for seen in (*chain.entries, *chain.exits, *(s.goal for s in stages))
        }.values():
            handles.append(slot_at(seen, subject).register(_record(before, seen.tensor_path), subject.tokens))
        written = trace(subject, only=paths)
    finally:
        for handle in handles:
            handle.remove()
    wrong = set()
    for index, layer in enumerate(chain.layers):
        output = _value_in(written, chain.exits[index].tensor_path)
        reaches_next = True
        if index < len(chain.factors):
            following = before[chain.entries[index + 1].tensor_path]
            reaches_next = output is not None and torch.equal(
                following, output.reshape(following.shape) * chain.factors[index]
            )
        if not reaches_next or not _sum_holds(probed, written, slots, sites, index, before):
            wrong.add(layer)
    return wrong


def _record(records: dict[TensorPath, Tensor], tensor_path: TensorPath) -> Callable[[Tensor], None]:
    def edit(value: Tensor) -> None:
        records[tensor_path] = value.detach().to("cpu", copy=True)

    return edit


def _value_in(written: Trace, tensor_path: TensorPath) -> Tensor | None:
    """Return the value of one tensor in another recorded forward; None if it was not there."""
    found = (
        item for item in written.one(tensor_path.path, tensor_path.port) if item.tensor_path.keys == tensor_path.keys
    )
    return next((written.values[item.value] for item in found), None)


def _sum_holds(
    probed: ProbeResult,
    written: Trace,
    slots: Slots,
    sites: Sequence[Site],
    index: int,
    before: Mapping[TensorPath, Tensor],
) -> bool:
    """Whether one block's output, before any write to it, is the sum of what was written into the block."""
    chain, sums = probed.chain, probed.sums[index]
    output = before[chain.exits[index].tensor_path]
    entry = _value_in(written, chain.entries[index].tensor_path)
    if entry is None:
        return False
    if isinstance(sums, str):  # no sum is known for this block: noise at its entry must change its output
        clean = probed.trace.values[chain.exits[index].value]
        unchanged = torch.equal(output, clean.reshape(output.shape))
        return Site("resid_pre", chain.layers[index]) not in sites or not unchanged
    stream: Tensor | None = entry
    for stage in sums.stages:
        partial = _written_middle(probed, written, slots, sites, index) if len(sums.stages) == 1 else {}
        start = _value_in(written, stage.start.tensor_path)
        source = start if stage.norm_input is None else _value_in(written, stage.norm_input.tensor_path)
        terms = [_value_in(written, term.tensor_path) for term in stage.terms]
        if partial is None or stream is None or start is None or source is None or any(term is None for term in terms):
            return False
        goal = before[stage.goal.tensor_path]
        parts = [part.reshape(goal.shape) for part in (start, *terms) if part is not None]
        if not torch.equal(source.reshape(stream.shape), stream):
            return False
        if not agrees(stage, stage.total(parts[0], parts[1:], given=partial), goal, parts):
            return False
        stream = _value_in(written, stage.goal.tensor_path)
    if sums.norm_output is None or sums.norm_output.tensor_path == chain.exits[index].tensor_path:
        return True
    normed = _value_in(written, sums.norm_output.tensor_path)
    return normed is not None and torch.equal(normed.reshape(output.shape), output)


def _written_middle(
    probed: ProbeResult, written: Trace, slots: Slots, sites: Sequence[Site], index: int
) -> dict[Tree, Tensor] | None:
    """Return the value written at a block's `resid_mid` by its node of the tree of additions.

    Returns:
        An empty mapping where nothing was written there; None where the value or its node is not known.
    """
    sums, roles = probed.sums[index], probed.roles[index]
    middle = Site("resid_mid", probed.chain.layers[index])
    if middle not in sites or isinstance(roles, str) or isinstance(sums, str):
        return {}
    node = sums.stages[0].node_of({0, *roles.mixers})
    value = _value_in(written, slots[middle].tensor_path)
    if node is None or value is None:
        return None
    return {node: value.reshape(probed.trace.values[sums.stages[0].goal.value].shape)}


def _failing_effects(probed: ProbeResult, slots: Slots) -> dict[Site, str]:
    """Hold the stream at its recorded values and write noise into the branches and at the first and last sites."""
    chain = probed.chain
    last = max((site.layer for site in slots if site.layer is not None), default=0)
    rounds = (("attn_z", "resid_post"), ("attn_in", "final_norm", "embed"), ("mlp_neurons",), ("mlp_in",))
    failing: dict[Site, str] = {}
    for names in rounds:
        noisy = [site for site in slots if site.name in names and (site.name != "resid_post" or site.layer == last)]
        if not noisy:
            continue
        added, found = _Noise(), dict[Slot, Tensor]()
        edits: dict[Slot, Edit] = {slots[site]: added.edit(site, slots[site]) for site in noisy}
        entries = [slot_at(entry, probed.subject) for entry in probed.chain.entries]
        for slot, entry in zip(entries, probed.chain.entries, strict=True):
            edits[slot] = restore(probed.trace.values[entry.value], found, slot)
        terms: dict[str, Slot] = {}
        for sums in probed.sums:
            for term in () if isinstance(sums, str) else sums.terms:
                slot = terms[str(term.tensor_path)] = slot_at(term, probed.subject)
                edits[slot] = restore(probed.trace.values[term.value], found, slot)
        exits = {layer: slot_at(exit_, probed.subject) for layer, exit_ in zip(chain.layers, chain.exits, strict=True)}
        for slot in exits.values():  # the last hook runs first, before any noise at the block's output
            edits[slot] = record(found, slot)
        logits: Tensor | None = None
        if any(site.name in ("resid_post", "final_norm") for site in noisy):
            logits = forward(probed.subject, edits)
        else:
            forward_blocks(probed.subject, edits)
        before: Tensor | None
        for site in noisy:
            if site.name == "embed":
                before, after = probed.trace.values[probed.chain.entries[0].value], found[entries[0]]
            elif site.layer is None or site.name == "resid_post":
                assert logits is not None
                before, after = probed.trace.output, logits
            else:
                before, after = _contribution(probed, site, terms, found)
                output = probed.trace.values[chain.exits[chain.layers.index(site.layer)].value]
                if not torch.equal(output.reshape(found[exits[site.layer]].shape), found[exits[site.layer]]):
                    failing[site] = "a value written there reached the residual stream outside its contribution, too"
            if before is None or torch.equal(before.reshape(after.shape), after):
                failing[site] = "a value written there had no effect"
    return failing


def _contribution(
    probed: ProbeResult, site: Site, terms: Mapping[str, Slot], found: Mapping[Slot, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the contribution of a site's branch: as recorded in the probe, and as found in this forward."""
    sums, roles = probed.block_of(site)
    assert not isinstance(sums, str) and not isinstance(roles, str)  # else the site would have been refused before
    numbers = roles.mixers if _BRANCHES[site.name] == "mixers" else roles.feed_forwards
    term = sums.terms[numbers[0] - 1]
    return probed.trace.values[term.value], found[terms[str(term.tensor_path)]]
