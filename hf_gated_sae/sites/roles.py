"""Distinguish a block's mixers (attention, state-space layers) from its feed-forwards (MLPs), by one forward.

The order of execution does not distinguish them: some blocks have only one of the two, and some compute both from the
same input. Proof, for all blocks in the same forward:

1. Every block gets its recorded input, with only the first position changed.
2. Every contribution is recorded, then replaced by its value in the probe, so that none depends on another's change.
3. A contribution that changes at later positions mixes positions; one that changes only at the first does not.
4. Where all of them mix positions, those that reach less far than the furthest, by a short convolution or a shift of
   one token, are the feed-forwards.
5. The block's output must not change at later positions: if it does, a contribution is missing in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Chain
from .probe import Seen, Subject, Trace, run, run_blocks
from .site import Site
from .slots import Edit, Slot
from .sums import Sums

_MIXING_SHARE = 0.01  # a smaller change at later positions, relative to that at the first, does not make a mixer
_REACH_SHARE = 1e-4  # a smaller one does not count towards how many positions a contribution reaches


@dataclass(frozen=True, slots=True)
class Roles:
    """The role of each term of one block; terms are numbered from 1.

    Args:
        mixers: terms in which one position depends on others.
        feed_forwards: terms in which each position depends on itself alone, or on fewer others than in the mixers.
        unresponsive: terms that did not change with the block's input, such as zeros, and whose role cannot be taken
            from another block either.
    """

    mixers: tuple[int, ...]
    feed_forwards: tuple[int, ...]
    unresponsive: tuple[int, ...] = ()


def slot_at(seen: Seen, subject: Subject) -> Slot:
    """Return the slot of a tensor that the probe recorded; its site is the module path."""
    return Slot(Site(seen.tensor_path.path, port=seen.tensor_path.port), seen.tensor_path, subject.root)


def forward(subject: Subject, edits: Mapping[Slot, Edit]) -> Tensor:
    """Run one forward with edits at slots.

    Returns:
        The logits, on the CPU.
    """
    with _registered(subject, edits):
        return run(subject)


def forward_blocks(subject: Subject, edits: Mapping[Slot, Edit]) -> None:
    """Run the blocks with edits at slots, for the values that the edits record."""
    with _registered(subject, edits):
        run_blocks(subject)


@contextmanager
def _registered(subject: Subject, edits: Mapping[Slot, Edit]) -> Iterator[None]:
    handles = []
    try:
        for slot, edit in edits.items():
            handles.append(slot.register(edit, subject.tokens))
        yield
    finally:
        for handle in handles:
            handle.remove()


def restore(clean: Tensor, found: dict[Slot, Tensor] | None = None, slot: Slot | None = None) -> Edit:
    """Return an edit that replaces a value by `clean` and records the replaced value in `found`."""

    def edit(value: Tensor) -> Tensor:
        if found is not None and slot is not None:
            found[slot] = value.detach().to("cpu", copy=True)
        return clean.reshape(value.shape).to(value, copy=True)  # some models add to their input in place

    return edit


def record(found: dict[Slot, Tensor], slot: Slot) -> Edit:
    """Return an edit that records a value in `found` and changes nothing."""

    def edit(value: Tensor) -> None:
        found[slot] = value.detach().to("cpu", copy=True)

    return edit


def noise(value: Tensor, seed: int) -> Tensor:
    """Return Gaussian noise in a tensor's shape, with its standard deviation; the global random state is not used."""
    spread = float(value.float().std().clamp_min(1e-3))
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * spread).to(value)


def assign_roles(subject: Subject, chain: Chain, sums: Sequence[Sums | str], trace: Trace) -> list[Roles | str]:
    """Find the role of every contribution, by one forward.

    Returns:
        One entry per block: its roles, or the reason why they are not known.
    """
    found: dict[Slot, Tensor] = {}
    edits: dict[Slot, Edit] = {}
    terms: list[list[Slot]] = []
    exits: list[Slot] = []
    for index, (entry, parts) in enumerate(zip(chain.entries, sums, strict=True)):
        clean = trace.values[entry.value]
        changed = clean.clone().view(*subject.tokens(), -1)
        changed[:, 0] += noise(changed[:, 0], index)
        edits[slot_at(entry, subject)] = restore(changed)
        slots = [] if isinstance(parts, str) else [slot_at(term, subject) for term in parts.terms]
        for slot, term in zip(slots, () if isinstance(parts, str) else parts.terms, strict=True):
            edits[slot] = restore(trace.values[term.value], found, slot)
        terms.append(slots)
        exits.append(slot_at(chain.exits[index], subject))
        edits[exits[-1]] = record(found, exits[-1])
    forward_blocks(subject, edits)
    roles: list[Roles | str] = []
    for slots, exit_, seen, parts in zip(terms, exits, chain.exits, sums, strict=True):
        if isinstance(parts, str):
            roles.append(parts)
        elif not _equal_at_later_positions(found[exit_], trace.values[seen.value]):
            roles.append(
                f"{seen.tensor_path.path} adds more than {' and '.join(str(term.tensor_path) for term in parts.terms)}"
            )
        else:
            roles.append(_roles(slots, parts, found, lambda seen: trace.values[seen.value]))
    return _completed_from_other_blocks(chain, sums, roles)


def _completed_from_other_blocks(
    chain: Chain, sums: Sequence[Sums | str], roles: Sequence[Roles | str]
) -> list[Roles | str]:
    """Give unresponsive terms the role that the same module has in other blocks."""
    mixing: dict[str, bool] = {}
    complete: list[Roles | str] = list(roles)
    named: list[tuple[int, Roles, list[str]]] = []
    for index, (path, found, role) in enumerate(zip(chain.paths, sums, roles, strict=True)):
        if not isinstance(found, str) and not isinstance(role, str):
            names = [str(term.tensor_path)[len(path) :] for term in found.terms]
            named.append((index, role, names))
            mixing |= {names[number - 1]: True for number in role.mixers}
            mixing |= {names[number - 1]: False for number in role.feed_forwards}
    for index, role, names in named:
        known = {number: mixing.get(names[number - 1]) for number in role.unresponsive}
        mixers, feed_forwards, unresponsive = (
            tuple(number for number in known if known[number] is kind) for kind in (True, False, None)
        )
        if known:
            complete[index] = Roles(
                tuple(sorted((*role.mixers, *mixers))),
                tuple(sorted((*role.feed_forwards, *feed_forwards))),
                unresponsive,
            )
    return complete


def _equal_at_later_positions(changed: Tensor, clean: Tensor) -> bool:
    return torch.equal(changed[:, 1:], clean.reshape(changed.shape)[:, 1:])


def _roles(
    slots: list[Slot], sums: Sums, found: Mapping[Slot, Tensor], clean: Callable[[Seen], Tensor]
) -> Roles | str:
    reaches: dict[int, int] = {}
    mixing: set[int] = set()
    unresponsive: list[int] = []
    for number, (slot, term) in enumerate(zip(slots, sums.terms, strict=True), start=1):
        if slot not in found:
            return f"{term.tensor_path} was not called in a second forward"
        change = (found[slot].float() - clean(term).reshape(found[slot].shape).float()).abs().amax(dim=(0, 2))
        at_first = float(change[0])
        if not at_first > 0:
            unresponsive.append(number)
            continue
        reaches[number] = int((change > _REACH_SHARE * at_first).nonzero().max())
        if float(change[1:].max()) > _MIXING_SHARE * at_first:
            mixing.add(number)
    if mixing and len(mixing) == len(reaches):
        furthest = max(reaches.values())
        mixing = {number for number in mixing if reaches[number] == furthest}
    feed_forwards = tuple(number for number in reaches if number not in mixing)
    return Roles(tuple(sorted(mixing)), feed_forwards, tuple(unresponsive))
