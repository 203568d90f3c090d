"""What the tokens of a forward call are: their positions, which are prompt, which are special.

Sites only see a tensor ``[B, S, d]``; in cached decoding `S` is 1 and says nothing about where the token stands. So
the model's own forward is watched for its arguments, and `generate` for where the prompt ends.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError
from ..interventions import Call, TokenContext, special_token_ids
from ..sites.probe import unwrap
from .arguments import ForwardArguments, by_name, cache_in, read, tensors_within
from .frames import call_frame, is_running
from .layout import describe_tokens
from .replay import forwards_of, in_backward, node_number
from .virtual import VirtualTokens, without_virtual

if TYPE_CHECKING:
    from .dispatch import Session


@dataclass
class _Generation:
    """One call of `generate`.

    Attributes:
        prompt: number of its prompt's columns; None until the first forward if the arguments do not tell.
        batch: number of rows of its prompt; None if the arguments do not tell.
        beams: whether it searches with beams, which reorders rows between calls.
        guided: whether it also calls the model without the prompt, or with a negative one, to be guided away from it.
    """

    prompt: int | None
    batch: int | None
    beams: bool = False
    guided: bool = False
    _cache: Any = None
    _begun: bool = False
    _others_turn: bool = False
    _others_prompt: int | None = None

    def prompt_of(self, call: ForwardArguments) -> int | None:
        """Return where the prompt of one of its calls ends; None if that is this call's end."""
        return self.prompt if self.owns(call) else self._others_prompt

    def learn_prompt(self, call: ForwardArguments, end: int) -> None:
        """Take note of a call that ends at a column, which is its prompt's end if it is the first one."""
        own = self.owns(call)
        if own:
            self.prompt = self.prompt or end
        else:
            self._others_prompt = self._others_prompt or end
        if not self._begun:
            self._cache = call.cache
        self._begun, self._others_turn = True, own

    def owns(self, call: ForwardArguments) -> bool:
        """Whether a call goes on from the prompt; the calls that guide it have a cache of their own."""
        if not self.guided or not self._begun:
            return True
        # Without a cache each step is a call of its own followed by one that guides it.
        return not self._others_turn if self._cache is None else call.cache is self._cache


# Generations that are running, by the id of the model without wrappers: another model that is called within one, as
# by a logits processor, has its own prompt and rows.
_generations: ContextVar[Mapping[int, _Generation]] = ContextVar("generations", default=MappingProxyType({}))


@contextmanager
def generating(
    models: Iterable[nn.Module],
    prompt: int | None,
    batch: int | None,
    *,
    beams: bool = False,
    guided: bool = False,
) -> Iterator[None]:
    """Let the forwards of models within be one generation.

    Args:
        models: the model that generates, and one that drafts for it, without wrappers.
        prompt: number of the prompt's columns; None if it is what the first forward is given.
        batch: number of rows of the prompt; None if that is not known.
        beams: whether rows are reordered between forwards.
        guided: whether some of the forwards have another prompt, or none (classifier-free guidance).
    """
    running = _generations.get()
    begun = {}
    for model in models:
        # A model that drafts generates within a generation, from a prompt that holds what is generated.
        outer = running.get(id(model))
        begun[id(model)] = (
            _Generation(outer.prompt, outer.batch, outer.beams) if outer else _Generation(prompt, batch, beams, guided)
        )
    token = _generations.set({**running, **begun})
    try:
        yield
    finally:
        _generations.reset(token)


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
        guided = is_guided(self._model, args, kwargs)
        args, kwargs = self._uncompiled(args, kwargs)
        models, assistant = [self._model], kwargs.get("assistant_model")
        if isinstance(assistant, nn.Module) and kwargs.get("assistant_tokenizer") is None:  # then of the same columns
            models.append(unwrap(assistant)[0])
        with generating(models, columns, rows, beams=beams, guided=guided):
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
    return (_setting("num_beams", model, args, kwargs) or 1) > 1


def is_guided(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `generate` asks for classifier-free guidance."""
    return (_setting("guidance_scale", model, args, kwargs) or 1) != 1


def _setting(name: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | float | None:
    """Return a number that a call of `generate` is given, or falls back on."""
    configs = [*args, kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    named = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((number for number in named if isinstance(number, (int, float))), None)


def _own_generate(model: nn.Module) -> Any:
    return type(model).generate.__get__(model)  # type: ignore[attr-defined]  # only models that have it get here


@dataclass(frozen=True)
class _Running:
    """One call that is running.

    Attributes:
        sessions: what acts on it.
        start: number of the first node of its graph.
        backward: the backward() within which it runs; -1 if none.
        frame: where the interpreter runs it; None if that is not known.
        call: what is known of it; None if it failed early.
    """

    sessions: tuple[Session, ...]
    start: int
    backward: int
    frame: FrameType | None
    call: Call | None = None


class TokenTracker:
    """Knows the tokens of the forward call that is running.

    Args:
        model: the causal LM, without wrappers.
        acting: gives what is attached and acts on a call from here.
        caches: names under which the model takes a cache that is no transformers `Cache`.
    """

    def __init__(
        self, model: nn.Module, acting: Callable[[], tuple[Session, ...]], caches: Collection[str] = ()
    ) -> None:
        self._acting = acting
        self._caches = tuple(caches)
        # Calls of the model that are running: more than one where the model is called from within its own forward.
        self._running: ContextVar[tuple[_Running, ...]] = ContextVar("running", default=())
        self._forwards = forwards_of(model)
        self._virtual = VirtualTokens(model)
        self._forward = type(model).forward
        self._handles: list[Any] = []
        # Caches of purely recurrent models do not know how many tokens they hold; some are mere lists of tensors.
        self._held: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[Tensor], Call] | None = None  # by the first tensor of such a list
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
            self._virtual.watch(_Watch)
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
        """Return rows and columns of the running call."""
        return self.current.tokens.shape

    @property
    def replaying(self) -> bool:
        """Whether backward() is running a layer again that gradient checkpointing did not keep."""
        backward = in_backward()
        if backward == -1:
            return False
        running = self._innermost()
        return running is None or running.backward != backward

    @property
    def sessions(self) -> tuple[Session, ...]:
        """What acts on the running call.

        Raises:
            AttachError: if a forward is run again, and it is not clear which one.
        """
        if self.replaying:  # on a GPU in a thread of its own, which does not know what was attached where
            return self._forwards.sessions()
        running = self._innermost()
        return running.sessions if running else self._acting()

    @property
    def current(self) -> Call:
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
        """Return the call that is running; torch does not tell the hook after a call that it was interrupted."""
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
        """Take note that the model's forward begins, with these arguments.

        Args:
            model: the model.
            args: of its forward.
            kwargs: of its forward.
            frame: where the interpreter runs the call; None if it is sure that `end` is called, whatever happens.
        """
        self._innermost()
        running = _Running(self._acting(), node_number(), in_backward(), frame)
        # First, since the hook after the call always takes one off.
        self._running.set((*self._running.get(), running))
        if not running.sessions:
            return
        described = self.describe(model, args, kwargs)
        self._running.set((*self._running.get()[:-1], dataclasses.replace(running, call=described)))

    def describe(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return what is known of a call's tokens, given its arguments before it runs.

        Raises:
            AttachError: if an argument is not understood.
        """
        call = read(by_name(self._forward, args, kwargs), self._caches)
        generation = _generations.get().get(id(model))
        # Calls that guide a generation are not prepared by a wrapper, and so have none.
        virtual = self._virtual.of(call, generating=generation is not None and generation.owns(call))
        history = self._history(call.cache, virtual.cached)
        call = without_virtual(call, virtual, history.past)
        if not history.past or self._special is None:  # a decoding step has no time to ask
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
            unplaced=history.unknown,
        )
        if generation:
            generation.learn_prompt(call, tokens.end - virtual.columns)
        return Call(tokens, history.kept)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Take note that it has ended, with this output; None if it failed."""
        running = self._innermost()
        if running is None:
            return
        self._running.set(self._running.get()[:-1])
        if output is not None and running.backward == -1:
            self._forwards.note(running.start, running.call, running.sessions)
        if running.call is None:
            return
        running.call.finish()
        if output is None:  # it failed
            return
        for session in running.sessions:
            session.completed += 1
        self.keep(running.call, output)

    def keep(self, call: Call, output: Any) -> None:
        """Remember a call by the cache that it returned, for the call that continues from it."""
        cache = cache_in(output if isinstance(output, Mapping) else {}, self._caches)
        if _can_be_key(cache):
            self._held[cache] = call
        elif (first := next(tensors_within(cache), None)) is not None:
            self._last = weakref.ref(first), call

    def _history(self, cache: Any, virtual: int) -> _History:
        """Return what is known of the columns that a call's cache holds, virtual tokens left out."""
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
        return _History(past, held.tokens if held.tokens.end == past else None, held.histories, held.tokens.unplaced)

    def _call_before(self, cache: Any) -> Call | None:
        """Return the call that gave a cache, if it was watched."""
        if _can_be_key(cache):
            return self._held.get(cache)
        first = next(tensors_within(cache), None)
        return self._last[1] if self._last is not None and first is not None and self._last[0]() is first else None


_UNPLACED = (
    "the cache holds tokens, but neither it nor an earlier call tells how many, so that it is not known where this "
    "call's tokens stand: begin with an empty cache while it is attached"
)


@dataclass(frozen=True)
class _History:
    """What is known of the columns before a call.

    Attributes:
        past: how many there are.
        previous: the call that ended with them, if it is known.
        kept: the histories of that call, see `Call.remember`.
        unknown: why it is not known how many there are; None if it is.
    """

    past: int = 0
    previous: TokenContext | None = None
    kept: Mapping[Any, Tensor] = dataclasses.field(default_factory=dict)
    unknown: str | None = None


def _holds_anything(cache: Any) -> bool:
    """Whether a cache that does not know its length has been written to; an empty one holds zeros, or nothing."""
    return any(bool(tensor.any()) for tensor in tensors_within(cache))


def _can_be_key(cache: Any) -> bool:
    """Whether something can be the key of a dictionary that does not keep it alive; lists and None cannot."""
    try:
        weakref.ref(cache)
        hash(cache)
    except TypeError:
        return False
    return True
