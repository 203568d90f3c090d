"""Which contributions of a block mix positions (attention and its kin), and which act on each token alone (MLPs).

The order of execution does not tell: some blocks hold only one of the two, and some compute both from the same input.
Where all contributions mix positions, those that reach only a few positions back, by a short convolution or a shift of
one token, are the feed-forwards. So one forward gives every block its recorded input with only the first position
changed, and looks where each contribution changes. Contributions are put back to their recorded values, so that none
sees another's change; were one missing in the sum, the block's output would change at the other positions, too.
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

_SHARE = 0.01  # a change at other positions counts from this share of the change at the changed position
_TRACE = 1e-4  # and from this share when it is asked how far a contribution reaches


@dataclass(frozen=True, slots=True)
class Roles:
    """The terms of one decomposition by what they do, counted from 1.

    Args:
        mixers: terms at which one position sees another.
        feeders: terms that act on each position alone, or see less far than the mixers.
        still: terms that did not react to the block's input, such as zeros, and that no other block tells the role of.
    """

    mixers: tuple[int, ...]
    feeders: tuple[int, ...]
    still: tuple[int, ...] = ()


def slot_at(seen: Seen, subject: Subject) -> Slot:
    """Return a slot for a tensor seen in the probe, named by its module path."""
    return Slot(Site(seen.place.path, port=seen.place.port), seen.place, subject.root)


def forward(subject: Subject, edits: Mapping[Slot, Edit]) -> Tensor:
    """Run one forward with edits at slots.

    Returns:
        The logits, on the CPU.
    """
    with _registered(subject, edits):
        return run(subject)


def forward_blocks(subject: Subject, edits: Mapping[Slot, Edit]) -> None:
    """Run the blocks with edits at slots, for what the edits note."""
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


def restore(clean: Tensor, raw: dict[Slot, Tensor] | None = None, slot: Slot | None = None) -> Edit:
    """Return an edit that puts a recorded value, and notes in `raw` what was there before."""

    def edit(value: Tensor) -> Tensor:
        if raw is not None and slot is not None:
            raw[slot] = value.detach().to("cpu", copy=True)
        return clean.reshape(value.shape).to(value, copy=True)  # some models add into what they are given

    return edit


def noted(raw: dict[Slot, Tensor], slot: Slot) -> Edit:
    """Return an edit that notes in `raw` what is there, and leaves it."""

    def edit(value: Tensor) -> None:
        raw[slot] = value.detach().to("cpu", copy=True)

    return edit


def noise(value: Tensor, seed: int) -> Tensor:
    """Return random numbers as large as a tensor's own spread, in its shape; the global random state is not used."""
    spread = float(value.float().std().clamp_min(1e-3))
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * spread).to(value)


def assign_roles(subject: Subject, chain: Chain, sums: Sequence[Sums | str], trace: Trace) -> list[Roles | str]:
    """Tell mixers from feed-forwards in every decomposed block, by one forward.

    Returns:
        One entry per block; the reason where the roles are not known.
    """
    raw: dict[Slot, Tensor] = {}
    edits: dict[Slot, Edit] = {}
    terms: list[list[Slot]] = []
    leaves: list[Slot] = []
    for index, (entry, found) in enumerate(zip(chain.entries, sums, strict=True)):
        clean = trace.values[entry.value]
        changed = clean.clone().view(*subject.tokens(), -1)
        changed[:, 0] += noise(changed[:, 0], index)
        edits[slot_at(entry, subject)] = restore(changed)
        slots = [] if isinstance(found, str) else [slot_at(term, subject) for term in found.terms]
        for slot, term in zip(slots, () if isinstance(found, str) else found.terms, strict=True):
            edits[slot] = restore(trace.values[term.value], raw, slot)
        terms.append(slots)
        leaves.append(slot_at(chain.exits[index], subject))
        edits[leaves[-1]] = noted(raw, leaves[-1])
    forward_blocks(subject, edits)
    roles: list[Roles | str] = []
    for slots, leave, seen, found in zip(terms, leaves, chain.exits, sums, strict=True):
        if isinstance(found, str):
            roles.append(found)
        elif not _same_elsewhere(raw[leave], trace.values[seen.value]):
            roles.append(f"{seen.place.path} adds more than {' and '.join(str(term.place) for term in found.terms)}")
        else:
            roles.append(_roles(slots, found, raw, lambda seen: trace.values[seen.value]))
    return _told_by_others(chain, sums, roles)


def _told_by_others(chain: Chain, sums: Sequence[Sums | str], roles: Sequence[Roles | str]) -> list[Roles | str]:
    """Give terms that did not react the role that the same module has in other blocks."""
    mixing: dict[str, bool] = {}
    complete: list[Roles | str] = list(roles)
    named: list[tuple[int, Roles, list[str]]] = []
    for index, (path, found, role) in enumerate(zip(chain.paths, sums, roles, strict=True)):
        if not isinstance(found, str) and not isinstance(role, str):
            names = [str(term.place)[len(path) :] for term in found.terms]
            named.append((index, role, names))
            mixing |= {names[number - 1]: True for number in role.mixers}
            mixing |= {names[number - 1]: False for number in role.feeders}
    for index, role, names in named:
        told = {number: mixing.get(names[number - 1]) for number in role.still}
        mixers, feeders, still = (
            tuple(number for number in told if told[number] is kind) for kind in (True, False, None)
        )
        if told:
            complete[index] = Roles(
                tuple(sorted((*role.mixers, *mixers))), tuple(sorted((*role.feeders, *feeders))), still
            )
    return complete


def _same_elsewhere(changed: Tensor, clean: Tensor) -> bool:
    return torch.equal(changed[:, 1:], clean.reshape(changed.shape)[:, 1:])


def _roles(slots: list[Slot], sums: Sums, raw: Mapping[Slot, Tensor], clean: Callable[[Seen], Tensor]) -> Roles | str:
    reaches: dict[int, int] = {}
    mixing: set[int] = set()
    still: list[int] = []
    for number, (slot, term) in enumerate(zip(slots, sums.terms, strict=True), start=1):
        if slot not in raw:
            return f"{term.place} was not there again in another forward"
        change = (raw[slot].float() - clean(term).reshape(raw[slot].shape).float()).abs().amax(dim=(0, 2))
        here = float(change[0])
        if not here > 0:
            still.append(number)
            continue
        reaches[number] = int((change > _TRACE * here).nonzero().max())
        if float(change[1:].max()) > _SHARE * here:
            mixing.add(number)
    if mixing and len(mixing) == len(reaches):
        furthest = max(reaches.values())
        mixing = {number for number in mixing if reaches[number] == furthest}
    feeders = tuple(number for number in reaches if number not in mixing)
    return Roles(tuple(sorted(mixing)), feeders, tuple(still))
