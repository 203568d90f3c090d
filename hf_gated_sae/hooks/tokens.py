"""What the tokens of a forward call are: their positions, which are prompt, which are special.

Sites only see a tensor ``[B, S, d]``; in cached decoding `S` is 1 and says nothing about where the token stands. So
the model's own forward is watched for its arguments, and `generate` for where the prompt ends.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError
from ..interventions import TokenContext
from .layout import describe_tokens

_CACHES = ("past_key_values", "cache_params", "state")


@dataclass
class _Generation:
    """One call of `generate`.

    Attributes:
        prompt: number of its prompt's columns; None until the first forward if the arguments do not tell.
    """

    prompt: int | None


_generation: ContextVar[_Generation | None] = ContextVar("generation", default=None)


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
    """

    def __init__(self, model: nn.Module) -> None:
        functools.update_wrapper(self, model.generate)  # type: ignore[arg-type]  # pipelines ask for its signature
        self.replaced = model.__dict__.get("generate")
        self._model = model
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]  # nn.Module says Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `generate`."""
        ids = args[0] if args else kwargs.get("inputs")
        known = (kwargs.get("inputs_embeds"), ids, kwargs.get("input_ids"))
        given = next((each for each in known if each is not None), None)
        if isinstance(given, Tensor) and given.ndim > 1 and not given.shape[1]:
            raise InputError(
                f"generate() was called with an empty prompt, {list(given.shape)}; expected at least one token."
            )
        outer = _generation.get()
        # A model that drafts for itself generates within a generation, from a prompt that holds what is generated.
        prompt = outer.prompt if outer else given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else None
        args, kwargs = self._uncompiled(args, kwargs)
        token = _generation.set(_Generation(prompt))
        try:
            return self._generate(*args, **kwargs)
        finally:
            _generation.reset(token)

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


def _own_generate(model: nn.Module) -> Any:
    return type(model).generate.__get__(model)  # type: ignore[attr-defined]  # only models that have it get here


class TokenTracker:
    """Knows the tokens of the forward call that is running.

    Args:
        model: the causal LM, without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        # Calls of the model that are running: more than one where the model is called from within its own forward.
        self._running: ContextVar[tuple[TokenContext | None, ...]] = ContextVar("running", default=())
        self._signature = inspect.signature(type(model).forward)
        self._handles: list[Any] = []
        # Caches of purely recurrent models do not know how many tokens they hold; some are mere lists of tensors.
        self._held: weakref.WeakKeyDictionary[Any, TokenContext] = weakref.WeakKeyDictionary()
        self._last: TokenContext | None = None
        self._trained: TokenContext | None = None
        self._trained_calls = 0
        self._replayed = False
        self.completed = 0
        """How many forwards have ended without an error."""

    def install(self, model: nn.Module) -> None:
        """Watch the model's forward and generate."""
        self._handles = [
            model.register_forward_pre_hook(_Watch(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Watch(self._after), always_call=True),
        ]
        if callable(getattr(model, "generate", None)):
            model.generate = GenerateBoundary(model)  # type: ignore[assignment]  # removed below

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
    def current(self) -> TokenContext:
        """The tokens of the running call.

        Raises:
            AttachError: if the forward that is running was not entered through the model that was attached to, or if
                it is not clear which forward is run again.
        """
        if self.replaying:
            self._replayed = True
            if self._trained is None or self._trained_calls != 1:
                raise AttachError(
                    f"backward() runs layers again (gradient checkpointing) after {self._trained_calls} forwards, "
                    "and it is not known which one is meant: call backward() after each forward "
                    "while something is attached."
                )
            return self._trained
        running = self._running.get()
        if not running or running[-1] is None:
            raise AttachError(
                "An attached site was reached although the model that was given to attach() was not called: call that "
                "model, or attach to the module that you call."
            )
        return running[-1]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.set((*self._running.get(), None))  # first, since the hook after the call always takes one off
        named: Mapping[str, Any] = self._signature.bind_partial(model, *args, **kwargs).arguments
        inner = named.get("kwargs")
        call = {**(inner if isinstance(inner, dict) else {}), **named}
        generation = _generation.get()
        past, previous = self._history(_cache_in(call))
        tokens = describe_tokens(
            model, call, past=past, previous=previous, prompt=generation.prompt if generation else None
        )
        if generation:
            generation.prompt = generation.prompt or tokens.end
        if self._replayed:
            self._replayed, self._trained_calls = False, 0
        self._running.set((*self._running.get()[:-1], tokens))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        running, cache = self._running.get(), _cache_in(output if isinstance(output, Mapping) else {})
        self._running.set(running[:-1])
        tokens = running[-1] if running else None
        if tokens is None or output is None:  # it failed
            return
        self.completed += 1
        self._last = tokens
        if _can_be_key(cache):
            self._held[cache] = tokens
        if torch.is_grad_enabled():
            self._trained, self._trained_calls = tokens, self._trained_calls + 1

    def _history(self, cache: Any) -> tuple[int, TokenContext | None]:
        """Return how many columns a call's cache holds, and the call that ended with them if it is known."""
        if cache is None:
            return 0, None
        held = self._held.get(cache) if _can_be_key(cache) else self._last
        try:
            past = int(cache.get_seq_length())
        except (ValueError, IndexError, TypeError, AttributeError):
            past = held.end if held else 0
        return past, held if held and held.end == past else None


def _cache_in(values: Mapping[str, Any]) -> Any:
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
