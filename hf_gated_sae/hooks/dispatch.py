"""One hook per place and model, however many interventions, names of the place and nested contexts use it.

All of them read the clean activation; what they add is summed, so that their order does not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..interventions import Edit, Replacement, SiteRun
from ..sites import Slot, resolve
from ..sites.probe import unwrap
from ..sites.slots import Place
from .report import Record
from .tokens import TokenTracker


class Session(Protocol):
    """Something attached: interventions to carry out at places, and observers of what comes out."""

    def records(self, place: Place) -> Sequence[Record]:
        """Interventions at a place."""

    def on_device(self, device: torch.device) -> dict[int, Any]:
        """SAEs by id, on a device."""

    def observe(self, place: Place, value: Tensor) -> None:
        """See the activation that the model goes on with."""


class Dispatcher:
    """Everything that is attached to one model.

    Args:
        model: the causal LM, without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracker = TokenTracker(model)
        self.sessions: list[Session] = []
        self._handles: dict[Place, Any] = {}
        self._users: dict[Place, int] = {}

    def enter(self, model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
        """Begin a session; if anything fails, everything is as before."""
        done: list[Slot] = []
        if not self.sessions:
            self.tracker.install(model)
        self.sessions.append(session)
        try:
            for slot in slots:
                self._refuse_second_replacement(slot)
                self._hold(slot)
                done.append(slot)
        except BaseException:
            self.leave(model, session, done)
            raise

    def leave(self, model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
        """End a session and remove the hooks that nobody else uses."""
        for slot in slots:
            self._users[slot.place] -= 1
            if not self._users[slot.place]:
                del self._users[slot.place]
                self._handles.pop(slot.place).remove()
        self.sessions = [other for other in self.sessions if other is not session]
        if not self.sessions:
            self.tracker.remove(model)
            _dispatchers.pop(model, None)

    def _hold(self, slot: Slot) -> None:
        if slot.place not in self._handles:
            self._handles[slot.place] = slot.register(
                self._hook(slot.place), tokens=lambda: self.tracker.current.shape
            )
        self._users[slot.place] = self._users.get(slot.place, 0) + 1

    def _refuse_second_replacement(self, slot: Slot) -> None:
        found = [record.intervention for session in self.sessions for record in session.records(slot.place)]
        replacing = [type(intervention).__name__ for intervention in found if isinstance(intervention, Replacement)]
        if len(replacing) > 1:
            raise InputError(f"Both {replacing[0]} and {replacing[1]} replace {slot.site}; attach only one of them.")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let calls of the model pass unedited, unreported and uncounted."""
        sessions, self.sessions = self.sessions, []
        completed = self.tracker.completed
        try:
            yield
        finally:
            self.sessions, self.tracker.completed = sessions, completed

    def _hook(self, place: Place) -> Callable[[Tensor], Tensor | None]:
        def hook(x: Tensor) -> Tensor | None:
            result = self._carry_out(place, x)
            for session in list(self.sessions):
                session.observe(place, x if result is None else result)
            return result

        return hook

    def _carry_out(self, place: Place, x: Tensor) -> Tensor | None:
        """Apply every intervention at a place; None if none of them means any token of this call."""
        records = [(session, record) for session in self.sessions for record in session.records(place)]
        if not records:
            return None
        tokens = self.tracker.current
        saes: dict[int, Any] = {}
        for session in {id(session): session for session, _ in records}.values():
            saes.update(session.on_device(x.device))
        run = SiteRun(x, tokens, saes)
        base, deltas = x, []
        with exact_dtype(x.device):
            for _, record in records:
                mask = record.intervention.mask(run)
                if not self.tracker.replaying:
                    record.add(tokens, mask)
                if mask is False:
                    continue
                if isinstance(record.intervention, Replacement):
                    base = _where(mask, record.intervention.replacement(run), base)
                elif isinstance(record.intervention, Edit):
                    deltas.append((mask, record.intervention.delta(run)))
            return _add(base, deltas, x)


def exact_dtype(device: torch.device) -> Any:
    """Return a context in which an SAE computes in its own dtype; autocast would make a float32 one bfloat16."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _where(mask: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    """Take `new` at the meant tokens, broadcast to the shape of `old`."""
    new = new.to(old.dtype).expand_as(old)
    return new if mask is True else torch.where(torch.as_tensor(mask).to(old.device).unsqueeze(-1), new, old)


def _add(base: Tensor, deltas: Sequence[tuple[Tensor | bool, Tensor]], x: Tensor) -> Tensor | None:
    """Add the masked deltas in the widest dtype involved and round once; None if nothing is to be changed."""
    if not deltas:
        return None if base is x else base
    total: Tensor | None = None
    for mask, delta in deltas:
        if mask is not True:
            delta = torch.where(torch.as_tensor(mask).to(delta.device).unsqueeze(-1), delta, delta.new_zeros(()))
        total = delta if total is None else total + delta
    assert total is not None
    wide = torch.promote_types(base.dtype, total.dtype)
    return (base.to(wide) + total.to(wide)).to(x.dtype)


def prove(model: nn.Module, sites: Iterable[str]) -> dict[str, Slot]:
    """Prove sites, with everything that is attached standing aside while the model is probed.

    Returns:
        The place of each site.

    Raises:
        SiteError: for a site that does not exist or could not be proven.
    """
    dispatcher = _dispatchers.get(unwrap(model)[0])
    with dispatcher.paused() if dispatcher else nullcontext():
        resolved = resolve(model)
        return {site: resolved[site] for site in sites}


# Two threads may attach to one model: each holds its own session, and counting them must not race.
_LOCK = threading.RLock()
_dispatchers: WeakKeyDictionary[nn.Module, Dispatcher] = WeakKeyDictionary()


def enter(model: nn.Module, session: Session, slots: Collection[Slot]) -> TokenTracker:
    """Begin a session on a model, wrapped or not; all or nothing.

    Returns:
        What watches the model's calls.
    """
    root, _ = unwrap(model)
    with _LOCK:
        if root not in _dispatchers:
            _dispatchers[root] = Dispatcher(root)
        dispatcher = _dispatchers[root]
        dispatcher.enter(root, session, slots)
        return dispatcher.tracker


def leave(model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
    """End a session; the last one takes the model's last hook with it."""
    root, _ = unwrap(model)
    with _LOCK:
        if root in _dispatchers:
            _dispatchers[root].leave(root, session, slots)
