"""Find the forward of which backward() runs a layer again for gradient checkpointing.

Every node of an autograd graph has a number, which its thread counts up. The range of numbers that a forward used
identifies it: the number of the node for which a layer is run again is in the range of its forward.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from torch import nn

from ..errors import AttachError
from ..interventions import ModelCall
from ..upstream.torch_private import current_node_number, next_node_number

if TYPE_CHECKING:
    from .session import Session

# Maximum number of forwards that are remembered; positions and ids of the tokens of each are kept.
_KEPT = 256
_DETACHED = "but the edits of their forward were detached since"


@dataclass
class Forward:
    """A forward that left a graph.

    Attributes:
        start: number of the first node of its graph.
        end: number after the last one.
        thread: the thread that counted; the object, since the id of a thread that has ended may be reused.
        call: its tokens; None if nothing acted on it, or everything was detached.
        sessions: the sessions that acted on it, and whether each edits; weak, since its graph may outlive them.
        again: the same tokens, for the layers that are run again.
    """

    start: int
    end: int
    thread: threading.Thread
    call: ModelCall | None
    sessions: tuple[tuple[weakref.ref[Session], bool], ...]
    again: ModelCall | None = None


class Forwards:
    """The forwards of one model whose graphs may still be alive."""

    def __init__(self) -> None:
        self._kept: deque[Forward] = deque(maxlen=_KEPT)
        self._dropped = 0
        self._since = 0

    def begin(self) -> None:
        """Record the node number from which every forward is noted; earlier forwards were not edited."""
        self._since = next_node_number()

    def note(self, start: int, call: ModelCall | None, sessions: Sequence[Session]) -> None:
        """Record a forward that has ended in this thread and left a graph, whose first node had this number."""
        end = next_node_number()
        if len(self._kept) == _KEPT:
            self._dropped = max(self._dropped, self._kept[0].end)
        acted = tuple((weakref.ref(session), bool(session.interventions)) for session in sessions)
        self._kept.append(Forward(start, end, threading.current_thread(), call, acted))

    def release(self) -> None:
        """Release the tokens of all forwards, when nothing is attached any more."""
        for forward in self._kept:
            forward.call = forward.again = None

    def sessions(self) -> tuple[Session, ...]:
        """Return the sessions that act on the forward that is run again.

        Raises:
            AttachError: if that forward is unknown, or an edit of it was detached.
        """
        forward = self._running()
        if forward is None or not forward.sessions:
            return ()
        acting = []
        for reference, edits in forward.sessions:
            session = reference()
            if session is not None and session.active and forward.call is not None:
                acting.append(session)
            elif edits:
                _refuse(_DETACHED)
        return tuple(acting)

    def call(self) -> ModelCall:
        """Return the tokens of the forward that is run again.

        Raises:
            AttachError: if that forward is unknown.
        """
        forward = self._running()
        if forward is None or forward.call is None:
            _refuse(_DETACHED)
        if forward.again is None:
            forward.again = ModelCall(forward.call.tokens, forward.call.past)
        return forward.again

    def _running(self) -> Forward | None:
        """Return the forward that is run again; None for one from before anything was attached."""
        number = current_node_number()
        found = [each for each in self._kept if number is not None and each.start <= number < each.end]
        if len({each.thread for each in found}) > 1:
            _refuse("but they may belong to forwards in several threads")
        if found:  # of nested calls of the model, the inner one has the smaller range
            return min(found, key=lambda each: each.end - each.start)
        if number is None or number >= self._since or number < self._dropped:
            _refuse("but their forward was not watched, or was too long ago")
        return None


def _refuse(why: str) -> NoReturn:
    raise AttachError(
        f"backward() runs layers again (gradient checkpointing), {why}, so it is not known how to edit them: call "
        "backward() after each forward, in the same thread, while the same interventions are attached."
    )


_forwards: weakref.WeakKeyDictionary[nn.Module, Forwards] = weakref.WeakKeyDictionary()


def forwards_of(model: nn.Module) -> Forwards:
    """Return the record of a model's forwards; it outlives attachments, as graphs do."""
    return _forwards.setdefault(model, Forwards())
