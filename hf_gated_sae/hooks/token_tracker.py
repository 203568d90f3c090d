"""Track the tokens of a forward call: their positions, which belong to the prompt, which are special.

A hook at a site gets only a tensor ``[B, S, d]``; in cached decoding `S` is 1, which does not show the token's
position. So the model's own forward is watched for its arguments, and `generate` for where the prompt ends.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AttachError
from ..interventions import ModelCall, TokenContext, special_token_ids
from ..upstream.torch_private import current_backward, next_node_number
from .generation import GENERATIONS, GenerateBoundary
from .peft_virtual_tokens import NONE, VirtualTokens, without_virtual
from .recomputation import forwards_of
from .running_call import (
    PLACES,
    CallFacts,
    ForwardArguments,
    by_name,
    cache_in,
    call_frame,
    is_running,
    read,
    tensors_within,
)
from .token_positions import describe_tokens

if TYPE_CHECKING:
    from .session import Session


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Ignore:
    """Replaces a hook in a copy of the model, and does nothing."""

    def __call__(self, *_: object) -> None:
        return None


class _Watch:
    """A hook on the model; a copied or unpickled model gets one that does nothing, since nothing is attached to it."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        self._act(*args)

    def __reduce__(self) -> tuple[type[_Ignore], tuple[()]]:
        return _Ignore, ()


@dataclass(frozen=True)
class _Running:
    """One call that is running.

    Attributes:
        sessions: the sessions that act on it.
        start: number of the first autograd node that it may create.
        backward: the backward() within which it runs; -1 if none.
        frame: its interpreter frame; None if unknown.
        call: its tokens; None before they are described, or if that failed.
    """

    sessions: tuple[Session, ...]
    start: int
    backward: int
    frame: FrameType | None
    call: ModelCall | None = None


class TokenTracker:
    """Tracks the tokens of the running forward call.

    Args:
        model: the causal LM, without wrappers.
        acting: returns the sessions that act on a call from the current thread or task.
        facts: the proven facts about the model's calls.
    """

    def __init__(self, model: nn.Module, acting: Callable[[], tuple[Session, ...]], facts: CallFacts) -> None:
        self._acting = acting
        self._facts = facts
        self._caches = facts.caches
        # Calls of the model that are running: more than one where the model is called from within its own forward.
        self._running: ContextVar[tuple[_Running, ...]] = ContextVar("running", default=())
        self._forwards = forwards_of(model)
        self._virtual = VirtualTokens(model)
        self._forward = type(model).forward
        self._handles: list[Any] = []
        # Caches of purely recurrent models do not know how many tokens they hold; some are mere lists of tensors.
        self._held: weakref.WeakKeyDictionary[Any, ModelCall] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[Tensor], ModelCall] | None = None  # by the first tensor of such a list
        self._special: Tensor | None = None

    def install(self, model: nn.Module) -> None:
        """Watch the model's forward and generate, and its wrappers that are not watched yet; all or nothing."""
        try:
            if not self._handles:
                self._forwards.begin()
                begin, end = _Watch(self._begin_here), _Watch(self.end)
                self._handles.append(model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
                self._handles.append(model.register_forward_hook(end, always_call=True))
                if callable(getattr(model, "generate", None)):
                    model.generate = GenerateBoundary(model, self._acting)  # type: ignore[assignment]  # removed below
            self._virtual.watch(_Watch, self._begin_here, self.end)
        except BaseException:
            self.remove(model)
            raise

    def remove(self, model: nn.Module) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._virtual.remove()
        self._forwards.release()
        boundary = model.__dict__.get("generate")
        if isinstance(boundary, GenerateBoundary):
            del model.generate
            if boundary.replaced is not None:
                model.generate = boundary.replaced

    def shape(self) -> tuple[int, int]:
        """Return ``(B, S)`` of the running call."""
        return self.current.tokens.shape

    @property
    def replaying(self) -> bool:
        """Whether backward() is running a layer again for gradient checkpointing."""
        backward = current_backward()
        if backward == -1:
            return False
        running = self._innermost()
        return running is None or running.backward != backward

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that act on the running call.

        Raises:
            AttachError: if a forward is run again, and it is not clear which one.
        """
        if self.replaying:  # on a GPU in a thread whose context lacks the sessions
            return self._forwards.sessions()
        running = self._innermost()
        return running.sessions if running else self._acting()

    @property
    def current(self) -> ModelCall:
        """The running call.

        Raises:
            AttachError: if the forward that is running was not entered through the model that was attached to, or if
                it is not clear which forward is run again.
        """
        if self.replaying:
            return self._forwards.call()
        running = self._innermost()
        if running is None or running.call is None:
            raise AttachError(
                "An attached site was reached although the model that was given to attach() was not called: call that "
                "model, or attach to the module that you call."
            )
        return running.call

    def _innermost(self) -> _Running | None:
        """Return the innermost running call; drop interrupted ones, whose end torch does not report to hooks."""
        before = running = self._running.get()
        while running and not is_running(running[-1].frame):
            running = running[:-1]
        if running is not before:
            self._running.set(running)
        return running[-1] if running else None

    def _begin_here(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin(model, args, kwargs, frame=call_frame())

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, frame: FrameType | None = None
    ) -> None:
        """Record that the model's forward begins, with these arguments.

        Args:
            model: the model.
            args: of its forward.
            kwargs: of its forward.
            frame: the interpreter frame of the call; None if `end` is certain to be called.
        """
        self._innermost()
        running = _Running(self._acting(), next_node_number(), current_backward(), frame)
        # Before anything can fail, since the hook after the call always removes an entry.
        self._running.set((*self._running.get(), running))
        if not running.sessions:
            return
        try:
            described = self.describe(model, args, kwargs)
        except Exception as error:
            for session in running.sessions:
                session.fail(error)
            raise
        self._running.set((*self._running.get()[:-1], dataclasses.replace(running, call=described)))

    def describe(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        """Return the tokens of a call that is about to run, given its arguments.

        Raises:
            AttachError: if an unknown argument may be a cache, a padding mask or positions.
        """
        call = read(by_name(self._forward, args, kwargs), self._caches)
        generation = GENERATIONS.get().get(id(model))
        if self._facts.padding and generation is None:
            self._warn_of_padding(model, call)
        # Guidance calls of a generation are not prepared by a wrapper, and so have no virtual tokens.
        guided = generation is not None and not generation.owns(call)
        virtual = (
            self._virtual.of(call, generating=generation is not None and not guided) if "peft" in sys.modules else NONE
        )
        history = self._history(call.cache, virtual.cached)
        call = call if virtual is NONE else without_virtual(call, virtual, history.past)
        if not history.past:
            self._special = None  # looked up for each prompt, not for each decoding step
        elif self._special is None:
            self._special = torch.tensor(special_token_ids(model))
        prompt = generation.prompt_of(call) if generation else None
        tokens = describe_tokens(
            model,
            call,
            past=history.past,
            previous=history.previous,
            prompt=None if prompt is None else prompt + virtual.columns,
            batch=generation.batch if generation else None,
            beams=bool(generation and generation.beams),
            special_ids=self._special,
            virtual=virtual.columns,
            unknown_positions=history.unknown,
        )
        if generation:
            generation.learn_prompt(call, tokens.end - virtual.columns)
        return ModelCall(tokens, history.kept)

    def _warn_of_padding(self, model: nn.Module, call: ForwardArguments) -> None:
        """Warn, once per model, if a batch is padded on the left and the model treats the padding as text."""
        if call.mask is None or model in _warned or (call.position_ids is not None and self._facts.padding == PLACES):
            return
        if bool((call.mask[:, 0] != 0).all()):
            return
        _warned.add(model)
        advice = "pad on the right, or call it row by row"
        if self._facts.padding == PLACES:
            advice = "pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), as generate() does"
        warnings.warn(
            f"{type(model).__name__} was called with padding on the left, for which it computes other results than "
            f"for each row alone: {advice}.",
            UserWarning,
            stacklevel=2,
        )

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Record that the running call has ended; `output` is None if it failed."""
        running = self._innermost()
        if running is None:
            return
        self._running.set(self._running.get()[:-1])
        left_graph = next_node_number() != running.start
        if output is not None and running.backward == -1 and left_graph:
            self._forwards.note(running.start, running.call, running.sessions)
        if running.call is None:
            return
        if output is not None:  # else it failed
            for session in running.sessions:
                session.completed += 1
            self.keep(running.call, output)
        running.call.finish()

    def keep(self, call: ModelCall, output: Any) -> None:
        """Remember a call by the cache that it returned, for the call that continues from it."""
        cache = cache_in(output if isinstance(output, Mapping) else {}, self._caches)
        if _can_be_key(cache):
            self._held[cache] = call
        elif (first := next(tensors_within(cache), None)) is not None:
            self._last = weakref.ref(first), call

    def _history(self, cache: Any, virtual: int) -> _History:
        """Return what is known of the columns in a call's cache, without virtual tokens."""
        if cache is None:
            return _History()
        held = self._call_before(cache)
        try:
            past = max(int(cache.get_seq_length()) - virtual, 0)
        except (ValueError, IndexError, TypeError, AttributeError):
            if held is None:
                return _History(unknown=_UNPLACED if _holds_anything(cache) else None)
            past = held.tokens.end
        if held is None:
            return _History(past)
        return _History(
            past, held.tokens if held.tokens.end == past else None, held.histories, held.tokens.unknown_positions
        )

    def _call_before(self, cache: Any) -> ModelCall | None:
        """Return the call that returned a cache, if it was watched."""
        if _can_be_key(cache):
            return self._held.get(cache)
        first = next(tensors_within(cache), None)
        return self._last[1] if self._last is not None and first is not None and self._last[0]() is first else None


_UNPLACED = (
    "the cache holds tokens, but neither the cache nor an earlier call shows how many, so the positions of this "
    "call's tokens are unknown: attach first, then begin with an empty cache"
)


@dataclass(frozen=True)
class _History:
    """What is known of the columns before a call.

    Attributes:
        past: number of columns.
        previous: the call that ended with them, if it is known.
        kept: the histories of that call, see `ModelCall.remember`.
        unknown: why `past` is unknown; None if it is known.
    """

    past: int = 0
    previous: TokenContext | None = None
    kept: Mapping[Any, Tensor] = dataclasses.field(default_factory=dict)
    unknown: str | None = None


def _holds_anything(cache: Any) -> bool:
    """Whether a cache of unknown length has been written to; an empty one holds zeros, or nothing."""
    return any(bool(tensor.any()) for tensor in tensors_within(cache))


def _can_be_key(cache: Any) -> bool:
    """Whether something can be the key of a weak dictionary; lists and None cannot."""
    try:
        weakref.ref(cache)
        hash(cache)
    except TypeError:
        return False
    return True
