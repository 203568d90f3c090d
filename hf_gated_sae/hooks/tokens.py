"""What the tokens of a forward call are: their positions, which are prompt, which are special.

Sites only see a tensor ``[B, S, d]``; in cached decoding `S` is 1 and says nothing about where the token stands. So
the model's own forward is watched for its arguments, and `generate` for where the prompt ends.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError
from ..interventions import Call, TokenContext, special_token_ids
from .layout import describe_tokens

_CACHES = ("past_key_values", "cache_params", "state")


@dataclass
class _Generation:
    """One call of `generate`.

    Attributes:
        prompt: number of its prompt's columns; None until the first forward if the arguments do not tell.
        batch: number of rows of its prompt; None if the arguments do not tell.
        beams: whether it searches with beams, which reorders rows between calls.
    """

    prompt: int | None
    batch: int | None
    beams: bool = False


_generation: ContextVar[_Generation | None] = ContextVar("generation", default=None)


@contextmanager
def generating(prompt: int | None, batch: int | None, *, beams: bool = False) -> Iterator[None]:
    """Let the forwards within be one generation.

    Args:
        prompt: number of the prompt's columns; None if it is what the first forward is given.
        batch: number of rows of the prompt; None if that is not known.
        beams: whether rows are reordered between forwards.
    """
    # A model that drafts for itself generates within a generation, from a prompt that holds what is generated.
    outer = _generation.get()
    inner = _Generation(outer.prompt, outer.batch, outer.beams) if outer else _Generation(prompt, batch, beams)
    token = _generation.set(inner)
    try:
        yield
    finally:
        _generation.reset(token)


class _Ignore:
    """Stands where a hook was on the model that was copied."""

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


class GenerateBoundary:
    """Stands in for a model's `generate` while something is attached, to remember where the prompt ends.

    It also keeps `generate` from compiling the forward, as it does on a GPU with a static cache: what was compiled
    earlier would run without the hooks.

    Args:
        model: the model whose `generate` is called.
        acting: gives what is attached and acts on a call from here; if nothing, `generate` runs as ever.
    """

    def __init__(self, model: nn.Module, acting: Callable[[], tuple[Session, ...]]) -> None:
        functools.update_wrapper(self, model.generate)  # type: ignore[arg-type]  # pipelines ask for its signature
        self._acting = acting
        self.replaced = model.__dict__.get("generate")
        self._model = model
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]  # nn.Module says Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `generate`."""
        if not self._acting():
            return self._generate(*args, **kwargs)
        ids = args[0] if args else kwargs.get("inputs")
        known = (kwargs.get("inputs_embeds"), ids, kwargs.get("input_ids"))
        given = next((each for each in known if each is not None), None)
        if isinstance(given, Tensor) and given.ndim > 1 and not given.shape[1]:
            raise InputError(
                f"generate() was called with an empty prompt, {list(given.shape)}; expected at least one token."
            )
        rows, columns = given.shape[:2] if isinstance(given, Tensor) and given.ndim > 1 else (None, None)
        beams = has_beams(self._model, args, kwargs)
        args, kwargs = self._uncompiled(args, kwargs)
        with generating(columns, rows, beams=beams):
            return self._generate(*args, **kwargs)

    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parameters = list(inspect.signature(self._generate).parameters)
        if "generation_config" not in parameters:  # not transformers' own
            return args, kwargs
        at = parameters.index("generation_config")
        config = copy.copy(args[at] if len(args) > at else kwargs.get("generation_config"))
        if config is None:
            return args, {**kwargs, "disable_compile": True}
        config.disable_compile = True
        if len(args) > at:
            return (*args[:at], config, *args[at + 1 :]), kwargs
        return args, {**kwargs, "generation_config": config}

    def __reduce__(self) -> tuple[Any, ...]:
        """Give a copied or unpickled model its own plain `generate`."""
        return _own_generate, (self._model,)


def has_beams(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `generate` asks for beam search."""
    configs = [*args, kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    named = [kwargs.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs)]
    return (next((number for number in named if isinstance(number, int)), None) or 1) > 1


def _own_generate(model: nn.Module) -> Any:
    return type(model).generate.__get__(model)  # type: ignore[attr-defined]  # only models that have it get here


class Session(Protocol):
    """What the tracker tells of the model's calls to."""

    active: bool
    completed: int


@dataclass(frozen=True)
class _Running:
    """One call that is running: what is known of it, None if it failed early, and what acts on it."""

    call: Call | None
    sessions: tuple[Any, ...]


class TokenTracker:
    """Knows the tokens of the forward call that is running.

    Args:
        model: the causal LM, without wrappers.
        acting: gives what is attached and acts on a call from here.
    """

    def __init__(self, model: nn.Module, acting: Callable[[], tuple[Any, ...]]) -> None:
        self._acting = acting
        # Calls of the model that are running: more than one where the model is called from within its own forward.
        self._running: ContextVar[tuple[_Running, ...]] = ContextVar("running", default=())
        self._signature = inspect.signature(type(model).forward)
        self._handles: list[Any] = []
        # Caches of purely recurrent models do not know how many tokens they hold; some are mere lists of tensors.
        self._held: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
        self._last: Call | None = None
        self._trained: _Running | None = None
        self._trained_calls = 0
        self._replay: Call | None = None
        self._special: Tensor | None = None

    def install(self, model: nn.Module) -> None:
        """Watch the model's forward and generate."""
        self._handles = [
            model.register_forward_pre_hook(_Watch(self.begin), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Watch(self.end), always_call=True),
        ]
        if callable(getattr(model, "generate", None)):
            model.generate = GenerateBoundary(model, self._acting)  # type: ignore[assignment]  # removed below

    def remove(self, model: nn.Module) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        boundary = model.__dict__.get("generate")
        if isinstance(boundary, GenerateBoundary):
            del model.generate
            if boundary.replaced is not None:
                model.generate = boundary.replaced

    @property
    def replaying(self) -> bool:
        """Whether backward() is running a layer again that gradient checkpointing did not keep."""
        return not self._running.get() and torch._C._current_graph_task_id() != -1

    @property
    def sessions(self) -> tuple[Any, ...]:
        """What acts on the running call."""
        if self.replaying:  # on a GPU in a thread of its own, which does not know what was attached where
            return tuple(each for each in self._trained.sessions if each.active) if self._trained else self._acting()
        running = self._running.get()
        return running[-1].sessions if running else self._acting()

    @property
    def current(self) -> Call:
        """The running call.

        Raises:
            AttachError: if the forward that is running was not entered through the model that was attached to, or if
                it is not clear which forward is run again.
        """
        if self.replaying:
            if self._trained is None or self._trained.call is None or self._trained_calls != 1:
                raise AttachError(
                    f"backward() runs layers again (gradient checkpointing) after {self._trained_calls} forwards, "
                    "and it is not known which one is meant: call backward() after each forward "
                    "while something is attached."
                )
            if self._replay is None:
                self._replay = Call(self._trained.call.tokens, self._trained.call.past)
            return self._replay
        running = self._running.get()
        if not running or running[-1].call is None:
            raise AttachError(
                "An attached site was reached although the model that was given to attach() was not called: call that "
                "model, or attach to the module that you call."
            )
        return running[-1].call

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note that the model's forward begins, with these arguments."""
        sessions = self._acting()
        # First, since the hook after the call always takes one off.
        self._running.set((*self._running.get(), _Running(None, sessions)))
        if not sessions:
            return
        named: Mapping[str, Any] = self._signature.bind_partial(model, *args, **kwargs).arguments
        inner = named.get("kwargs")
        call = {**(inner if isinstance(inner, dict) else {}), **named}
        generation = _generation.get()
        past, previous, histories = self._history(cache_in(call))
        if not past or self._special is None:  # a decoding step has no time to ask
            self._special = torch.tensor(special_token_ids(model))
        tokens = describe_tokens(
            model,
            call,
            past=past,
            previous=previous,
            prompt=generation.prompt if generation else None,
            batch=generation.batch if generation else None,
            beams=bool(generation and generation.beams),
            special_ids=self._special,
        )
        if generation:
            generation.prompt = generation.prompt or tokens.end
        if self._replay is not None:
            self._replay, self._trained_calls = None, 0
        self._running.set((*self._running.get()[:-1], _Running(Call(tokens, histories), sessions)))

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Take note that it has ended, with this output; None if it failed."""
        before, cache = self._running.get(), cache_in(output if isinstance(output, Mapping) else {})
        self._running.set(before[:-1])
        running = before[-1] if before else None
        if running is None or running.call is None:
            return
        running.call.finish()
        if output is None:  # it failed
            return
        for session in running.sessions:
            session.completed += 1
        self._last = running.call
        if _can_be_key(cache):
            self._held[cache] = running.call
        if torch.is_grad_enabled():
            self._trained, self._trained_calls = running, self._trained_calls + 1

    def _history(self, cache: Any) -> tuple[int, TokenContext | None, dict[int, Tensor]]:
        """Return how many columns a call's cache holds, the call that ended with them if known, and the histories."""
        if cache is None:
            return 0, None, {}
        held = self._held.get(cache) if _can_be_key(cache) else self._last
        try:
            past = int(cache.get_seq_length())
        except (ValueError, IndexError, TypeError, AttributeError):
            past = held.tokens.end if held else 0
        if held is None:
            return past, None, {}
        return past, held.tokens if held.tokens.end == past else None, held.histories


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments or a model's outputs, None if there is none."""
    return next((values[name] for name in _CACHES if values.get(name) is not None), None)


def _can_be_key(cache: Any) -> bool:
    """Whether something can be the key of a dictionary that does not keep it alive; lists and None cannot."""
    try:
        weakref.ref(cache)
        hash(cache)
    except TypeError:
        return False
    return True
