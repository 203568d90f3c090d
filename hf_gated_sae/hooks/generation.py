"""Which calls of a model belong to one `generate`: where its prompt ends, and how its rows are arranged."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import InputError
from ..sites.probe import unwrap
from .running_call import ForwardArguments

if TYPE_CHECKING:
    from .session import Session


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        prompt: number of its prompt's columns; None until the first forward if the arguments do not say.
        batch: number of rows of its prompt; None if the arguments do not say.
        beams: whether it searches with beams, which reorders rows between calls.
        guided: whether it also calls the model without the prompt, or with a negative one (classifier-free guidance).
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
        """Return the column where the prompt of one of its calls ends; None if that is this call's end."""
        return self.prompt if self.owns(call) else self._others_prompt

    def learn_prompt(self, call: ForwardArguments, end: int) -> None:
        """Record a call that ends at column `end`, which for the first one is the end of the prompt."""
        own = self.owns(call)
        if own:
            self.prompt = self.prompt or end
        else:
            self._others_prompt = self._others_prompt or end
        if not self._begun:
            self._cache = call.cache
        self._begun, self._others_turn = True, own

    def owns(self, call: ForwardArguments) -> bool:
        """Whether a call continues from the prompt; guidance calls have another cache."""
        if not self.guided or not self._begun:
            return True
        # Without a cache, calls from the prompt and guidance calls alternate.
        return not self._others_turn if self._cache is None else call.cache is self._cache


# Generations that are running, by the id of the model without wrappers: another model that is called within one, as
# by a logits processor, has its own prompt and rows.
GENERATIONS: ContextVar[Mapping[int, Generation]] = ContextVar("generations", default=MappingProxyType({}))


@contextmanager
def generating(
    models: Iterable[nn.Module],
    prompt: int | None,
    batch: int | None,
    *,
    beams: bool = False,
    guided: bool = False,
) -> Iterator[None]:
    """Count the forwards of some models inside this context as one generation.

    Args:
        models: the model that generates, and its assistant model if it has one, without wrappers.
        prompt: number of the prompt's columns; None if the prompt is the input of the first forward.
        batch: number of rows of the prompt; None if unknown.
        beams: whether rows are reordered between forwards.
        guided: whether some of the forwards have another prompt, or none (classifier-free guidance).
    """
    running = GENERATIONS.get()
    begun = {}
    for model in models:
        # An assistant model generates within a generation, from a prompt that already has generated tokens.
        outer = running.get(id(model))
        begun[id(model)] = (
            Generation(outer.prompt, outer.batch, outer.beams) if outer else Generation(prompt, batch, beams, guided)
        )
    token = GENERATIONS.set({**running, **begun})
    try:
        yield
    finally:
        GENERATIONS.reset(token)


class GenerateBoundary:
    """Replaces a model's `generate` while something is attached, to record where the prompt ends.

    It also keeps `generate` from compiling the forward, as it does on a GPU with a static cache: code compiled earlier
    would run without the hooks.

    Args:
        model: the model whose `generate` is called.
        acting: returns the sessions that act on a call from here; if there are none, `generate` runs unchanged.
    """

    def __init__(self, model: nn.Module, acting: Callable[[], tuple[Session, ...]]) -> None:
        functools.update_wrapper(self, model.generate)  # type: ignore[arg-type]  # pipelines inspect its signature
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
        if isinstance(assistant, nn.Module) and kwargs.get("assistant_tokenizer") is None:  # then of equal columns
            models.append(unwrap(assistant)[0])
        sessions = self._acting()
        with generating(models, columns, rows, beams=beams, guided=guided):
            result = self._generate(*args, **kwargs)
        prompt = columns if kwargs.get("inputs_embeds") is None else 0
        if new_tokens(result, prompt) > 1:  # the model does not run on the last one
            for session in sessions:
                session.generations += 1
        return result

    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parameters = list(inspect.signature(self._generate).parameters)
        if "generation_config" not in parameters:  # not transformers' own `generate`
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


def new_tokens(result: Any, prompt: int | None) -> int:
    """Return the number of tokens after the prompt in a result of `generate`; 0 if unknown.

    Args:
        result: ids ``[B, prompt + new]``, or an output that holds them.
        prompt: number of the prompt's columns among them.
    """
    ids = result.get("sequences") if isinstance(result, Mapping) else result
    return ids.shape[-1] - prompt if isinstance(ids, Tensor) and prompt is not None else 0


def has_beams(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `generate` uses beam search."""
    return (_setting("num_beams", model, args, kwargs) or 1) > 1


def is_guided(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `generate` uses classifier-free guidance."""
    return (_setting("guidance_scale", model, args, kwargs) or 1) != 1


def _setting(name: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | float | None:
    """Return a numeric setting of a call of `generate`, given or by default."""
    configs = [*args, kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    named = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((number for number in named if isinstance(number, (int, float))), None)


def _own_generate(model: nn.Module) -> Any:
    return type(model).generate.__get__(model)  # type: ignore[attr-defined]  # only models that have it get here
