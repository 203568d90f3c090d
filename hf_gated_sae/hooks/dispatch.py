"""One hook per site and model, however many interventions and nested contexts use it.

All of them read the clean activation; what they add is summed, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..interventions import Edit, Replacement, SiteRun
from ..sites import Slot, resolve
from .report import Record
from .tokens import TokenTracker


class Session(Protocol):
    """Something attached: interventions to carry out at sites, and observers of what comes out."""

    def records(self, site: str) -> list[Record]:
        """Interventions at a site."""

    def place(self, device: torch.device) -> dict[int, Any]:
        """SAEs by id, on a device."""

    def observe(self, site: str, value: Tensor) -> None:
        """See the activation that the model goes on with."""


class Dispatcher:
    """Everything that is attached to one model.

    Args:
        model: the causal LM, as the user calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracker = TokenTracker(model)
        self.sessions: list[Session] = []
        self._handles: dict[str, Any] = {}
        self._users: dict[str, int] = {}

    def enter(self, model: nn.Module, session: Session, sites: list[str]) -> None:
        """Begin a session; if anything fails, everything is as before."""
        done: list[str] = []
        if not self.sessions:
            self.tracker.install(model)
        self.sessions.append(session)
        try:
            for site in sites:
                self._hold(model, site)
                done.append(site)
        except BaseException:
            self.leave(model, session, done)
            raise

    def leave(self, model: nn.Module, session: Session, sites: list[str]) -> None:
        """End a session and remove the hooks that nobody else uses."""
        for site in sites:
            self._users[site] -= 1
            if not self._users[site]:
                del self._users[site]
                self._handles.pop(site).remove()
        self.sessions = [other for other in self.sessions if other is not session]
        if not self.sessions:
            self.tracker.remove(model)
            _dispatchers.pop(model, None)

    def _hold(self, model: nn.Module, site: str) -> None:
        if site not in self._handles:
            slot: Slot = resolve(model)[site]
            self._handles[site] = slot.register(self._hook(site), tokens=lambda: self.tracker.current.shape)
        self._users[site] = self._users.get(site, 0) + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let calls of the model pass unedited and unreported."""
        sessions, self.sessions = self.sessions, []
        try:
            yield
        finally:
            self.sessions = sessions

    def _hook(self, site: str) -> Callable[[Tensor], Tensor | None]:
        def hook(x: Tensor) -> Tensor | None:
            result = self._carry_out(site, x)
            for session in list(self.sessions):
                session.observe(site, x if result is None else result)
            return result

        return hook

    def _carry_out(self, site: str, x: Tensor) -> Tensor | None:
        """Apply every intervention at a site; None if none of them means any token of this call."""
        records = [(session, record) for session in self.sessions for record in session.records(site)]
        if not records:
            return None
        tokens = self.tracker.current
        placed: dict[int, Any] = {}
        for session in {id(session): session for session, _ in records}.values():
            placed.update(session.place(x.device))
        run = SiteRun(x, tokens, placed)
        base, deltas = x, []
        # The SAE computes in its own dtype: under autocast a float32 SAE would silently become a bfloat16 one.
        with (
            torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
        ):
            for _, record in records:
                mask = record.intervention.mask(run)
                record.add(tokens, mask)
                if mask is False:
                    continue
                if isinstance(record.intervention, Replacement):
                    base = _where(mask, record.intervention.replacement(run), base)
                elif isinstance(record.intervention, Edit):
                    deltas.append((mask, record.intervention.delta(run)))
            return _add(base, deltas, x)


def _where(mask: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    """Take `new` at the meant tokens, broadcast to the shape of `old`."""
    new = new.to(old.dtype).expand_as(old)
    return new if mask is True else torch.where(torch.as_tensor(mask).to(old.device).unsqueeze(-1), new, old)


def _add(base: Tensor, deltas: list[tuple[Tensor | bool, Tensor]], x: Tensor) -> Tensor | None:
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


def require_sites(model: nn.Module, sites: Iterable[str]) -> dict[str, int]:
    """Prove sites, with everything that is attached standing aside while the model is probed.

    Returns:
        Width of each site.

    Raises:
        SiteError: for a site that does not exist or could not be proven.
    """
    dispatcher = _dispatchers.get(model)
    with dispatcher.paused() if dispatcher else nullcontext():
        resolved = resolve(model)
        return {site: resolved[site].width for site in sites}


_dispatchers: WeakKeyDictionary[nn.Module, Dispatcher] = WeakKeyDictionary()


def dispatcher_of(model: nn.Module) -> Dispatcher:
    """Return the model's dispatcher, a new one if nothing is attached."""
    if model not in _dispatchers:
        _dispatchers[model] = Dispatcher(model)
    return _dispatchers[model]
