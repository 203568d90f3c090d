"""One hook per tensor and model, for all interventions, site names, threads and nested ``with`` blocks that use it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AttachError, InputError
from ..modeling import SAEModel
from ..sites import Slot, resolve
from ..sites.probe import unwrap
from ..sites.slots import TensorPath
from ..sites.transforms import view
from .apply import apply_interventions
from .continuation import facts_of, prove_calls
from .peft_virtual_tokens import know_wrapper
from .session import Session
from .token_tracker import TokenTracker

# A session acts on calls from the thread, or asyncio task, that began it, and on tasks begun there.
_ACTIVE: ContextVar[tuple[Session, ...]] = ContextVar("active", default=())
_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)


class Dispatcher:
    """Everything that is attached to one model.

    Args:
        model: the causal LM, without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracker = TokenTracker(model, self.acting, facts_of(model))
        self.sessions: list[Session] = []
        self._handles: dict[TensorPath, RemovableHandle] = {}
        self._users: dict[TensorPath, int] = {}

    def acting(self) -> tuple[Session, ...]:
        """Return the sessions that act on a call from this thread or task; the others note that it passed them by."""
        if _PAUSED.get():
            return ()
        here = _ACTIVE.get()
        acting = tuple(session for session in self.sessions if session.all_threads or session in here)
        for session in self.sessions if len(acting) < len(self.sessions) else ():
            session.passed_by = session.passed_by or session not in acting
        return acting

    def enter(self, model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
        """Begin a session; if that fails, nothing is changed."""
        done: list[Slot] = []
        self.sessions.append(session)
        session.begin()
        _ACTIVE.set((*(other for other in _ACTIVE.get() if other.active and other is not session), session))
        try:
            self.tracker.install(model)
            for slot in slots:
                self._refuse_second_replacement(slot, self.sessions if session.all_threads else self.acting())
                self._hold(slot)
                done.append(slot)
        except BaseException:
            self.leave(model, session, done)
            raise

    def leave(self, model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
        """End a session and remove the hooks that no other session uses."""
        session.active = False
        _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not session))
        for slot in slots:
            self._users[slot.tensor_path] -= 1
            if not self._users[slot.tensor_path]:
                del self._users[slot.tensor_path]
                self._handles.pop(slot.tensor_path).remove()
        self.sessions = [other for other in self.sessions if other is not session]
        if not self.sessions:
            self.tracker.remove(model)
            _dispatchers.pop(model, None)

    def _hold(self, slot: Slot) -> None:
        if slot.tensor_path not in self._handles:
            self._handles[slot.tensor_path] = slot.register(self._hook(slot), tokens=self.tracker.shape)
        self._users[slot.tensor_path] = self._users.get(slot.tensor_path, 0) + 1

    def _refuse_second_replacement(self, slot: Slot, sessions: Sequence[Session]) -> None:
        """Raise if two of the sessions that may act on one call replace the same site."""
        found = [record.intervention for session in sessions for record in session.records.get(slot.tensor_path, ())]
        replacing = [type(intervention).__name__ for intervention in found if intervention.replaces]
        if len(replacing) > 1:
            raise InputError(f"Both {replacing[0]} and {replacing[1]} replace {slot.site}; attach only one of them.")

    def _hook(self, slot: Slot) -> Callable[[Tensor], Tensor | None]:
        place, path = slot.tensor_path, slot.module_path()

        def hook(x: Tensor) -> Tensor | None:
            sessions = self.tracker.sessions
            if not sessions:  # a call from another thread, or one that nothing is to act on
                return None
            try:
                if any(getattr(parent, name, None) is not module for parent, name, module in path):
                    _raise_replaced(slot)
                result = self._apply(place, x, sessions)
            except Exception as error:
                for session in sessions:
                    session.fail(error)
                raise
            for session in sessions:
                if not session.observes:
                    continue
                standing = session.observe(place, x if result is None else result)
                result = result if standing is None else standing
            return result

        return hook

    def _apply(self, place: TensorPath, x: Tensor, sessions: Sequence[Session]) -> Tensor | None:
        """Apply every intervention at a site; return None if the activation stays the same."""
        records = [(session, record) for session in sessions for record in session.records.get(place, ())]
        reads = dict(pair for session in sessions for pair in session.reads.get(place, ()))
        if not records and not reads:
            return None
        call = self.tracker.current
        for site, transforms in reads.items():
            call.see(site, view(x, transforms).value if transforms else x)
        owners = {id(record.sae): session for session, record in records}

        def placed(sae: SAEModel, device: torch.device) -> SAEModel:
            return owners[id(sae)].placed(sae, device)

        replaying = self.tracker.replaying
        if replaying:
            call.forget()  # what the first run computed belongs to another graph
        return apply_interventions(x, call, [record for _, record in records], placed, replaying=replaying)


def _raise_replaced(slot: Slot) -> NoReturn:
    """Raise because the model has another module in place of the hooked one.

    Raises:
        AttachError: since a wrapper around the module, such as a LoRA layer, may read or write another activation.
        SiteError: if the model no longer has such a module.
    """
    raise AttachError(
        f"The module {slot.tensor_path.path!r} at {slot.site} was replaced by a {type(slot.module).__name__} after "
        "attach(), as get_peft_model() and quantisation do: call attach() again after the replacement."
    )


def prove(model: nn.Module, sites: Iterable[str]) -> dict[str, Slot]:
    """Prove sites, with all attached interventions paused while the model is probed.

    Returns:
        The slot of each site.

    Raises:
        SiteError: for a site that does not exist or could not be proven.
        AttachError: if the positions of tokens could not be determined in cached decoding.
    """
    know_wrapper(model, unwrap(model)[0])
    with paused():
        resolved = resolve(model)
        prove_calls(model)
        return {site: resolved[site] for site in sites}


@contextmanager
def paused() -> Iterator[None]:
    """Neither edit, report nor count model calls made from this thread or task."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


# Two threads may attach to one model: each holds its own session, and counting them must not race.
_LOCK = threading.RLock()
_dispatchers: WeakKeyDictionary[nn.Module, Dispatcher] = WeakKeyDictionary()


def enter(model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
    """Begin a session on a model, wrapped or not; all or nothing.

    Raises:
        AttachError: if it has begun already.
    """
    if session.active:
        raise AttachError("These interventions are attached already; disable() them first, or attach() them again.")
    root, _ = unwrap(model)
    with _LOCK:
        if root not in _dispatchers:
            _dispatchers[root] = Dispatcher(root)
        _dispatchers[root].enter(root, session, slots)


def leave(model: nn.Module, session: Session, slots: Collection[Slot]) -> None:
    """End a session; the last one removes the model's last hook."""
    root, _ = unwrap(model)
    with _LOCK:
        if root in _dispatchers:
            _dispatchers[root].leave(root, session, slots)


def is_attached(model: nn.Module) -> bool:
    """Whether anything is attached to a model, wrapped or not, from any thread."""
    return unwrap(model)[0] in _dispatchers
