"""Find the virtual tokens that PEFT's prompt and prefix tuning put before a prompt, unknown to the caller.

They are not tokens of the row: positions are counted without them, and they are left out like padding. Prompt tuning
adds them to the call as columns, prefix tuning adds them to the cache.

PEFT's AdaLoRA, and before 0.21 most of its other methods, such as LoRA, call the model's `forward` rather than the
model, so that no hook of the model runs; there the module that does so is watched in its place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError
from ..versions import require_supported
from .running_call import ForwardArguments, by_name, call_frame, is_running

# PEFT's names of the methods that fill the cache instead of prepending embeddings.
_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens before a call's tokens.

    Attributes:
        columns: number of those that are columns of this call or were columns of an earlier one.
        cached: number of those in the cache that never were columns.
        now: number of those that are columns of this call.
        ids: ids of this call's real tokens ``[B, S]``; None if they are unknown, or among its arguments.
    """

    columns: int = 0
    cached: int = 0
    now: int = 0
    ids: Tensor | None = None


@dataclass(frozen=True)
class _Entered:
    """A running call of a wrapper, its arguments by name, and its interpreter frame."""

    wrapper: nn.Module
    arguments: Mapping[str, Any]
    frame: FrameType | None


NONE = Virtual()
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def know_wrapper(model: nn.Module, root: nn.Module) -> None:
    """Record the wrapper through which a model is called, if it may put virtual tokens before the prompt."""
    if hasattr(model, "active_peft_config"):
        require_supported("peft")
        _wrappers.setdefault(root, weakref.WeakSet()).add(model)


def virtual_tokens(model: Any) -> int:
    """Return how many virtual tokens a model puts before each prompt: 0 unless it is a wrapper that does so now."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def takes_positions(model: Any) -> bool:
    """Return whether a model passes ``position_ids`` on: PEFT drops them where it adds columns to the call."""
    config: Any = getattr(model, "active_peft_config", None)
    return not virtual_tokens(model) or config.peft_type in _IN_CACHE


class VirtualTokens:
    """Finds the virtual tokens of a model's calls.

    Args:
        model: the causal LM, without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._handles: list[Any] = []
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._entered: ContextVar[_Entered | None] = ContextVar("entered", default=None)

    def watch(
        self,
        hook: Callable[[Callable[..., None]], Callable[..., None]],
        begin_call: Callable[..., None],
        end_call: Callable[..., None],
    ) -> None:
        """Watch the calls of the wrappers that are known.

        Args:
            hook: makes hooks of functions.
            begin_call: given the model and a call's arguments, where PEFT calls the model's `forward`.
            end_call: given the model, the arguments and the output, after such a call.
        """
        model = self._model()
        for wrapper in list(_wrappers.get(model, ())) if model is not None else ():
            if wrapper not in self._watched:
                self._watched.add(wrapper)
                begin, end = hook(self._begin), hook(self._end)
                self._handles.append(wrapper.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
                self._handles.append(wrapper.register_forward_hook(end, always_call=True))
                if (tuner := _calls_forward(wrapper, model)) is not None:
                    begin = hook(lambda _, *call: begin_call(model, *call))
                    end = hook(lambda _, *call: end_call(model, *call))
                    self._handles.append(tuner.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
                    self._handles.append(tuner.register_forward_hook(end, always_call=True))

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def of(self, call: ForwardArguments, *, generating: bool) -> Virtual:
        """Return the virtual tokens of a call of the model.

        Args:
            call: its arguments.
            generating: whether `generate` makes it; then PEFT prepares its arguments and does not make the call.
        """
        entered = self._entered.get()
        wrapper: Any
        arguments: Mapping[str, Any]
        if entered is not None and is_running(entered.frame):
            wrapper, arguments = entered.wrapper, entered.arguments
        elif (caller := _calling_wrapper(self._model())) is not None:
            wrapper, arguments = caller
        elif generating:
            prepare = vars(self._model()).get("prepare_inputs_for_generation")
            wrapper, arguments = getattr(prepare, "__self__", None), {}
        else:
            return NONE
        count = virtual_tokens(wrapper)
        if not count:
            return NONE
        if wrapper.active_peft_config.peft_type in _IN_CACHE:
            return Virtual(cached=count)
        prepended = call.ids is None
        return Virtual(columns=count, now=count if prepended else 0, ids=arguments.get("input_ids"))

    def _begin(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = by_name(type(wrapper).forward, args, kwargs)
        self._entered.set(_Entered(wrapper, arguments, call_frame()))

    def _end(self, *_: Any) -> None:
        self._entered.set(None)


def _calls_forward(wrapper: Any, model: nn.Module | None) -> nn.Module | None:
    """Return the module within a wrapper that calls the model's `forward` past its hooks; None if there is none."""
    tuner = getattr(wrapper, "base_model", None)
    if not isinstance(tuner, nn.Module) or tuner is model or getattr(tuner, "model", None) is not model:
        return None
    code = getattr(type(tuner).forward, "__code__", None)
    return tuner if code is not None and "forward" in code.co_names else None


def _calling_wrapper(model: nn.Module | None) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """Return the PEFT wrapper whose running forward calls a model, and its arguments; None if there is none.

    This finds a wrapper that is not known because attach() was given the model inside it.
    """
    frame = sys._getframe(1) if "peft" in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name == "forward" and str(frame.f_globals.get("__name__")).startswith("peft."):
            known = frame.f_locals
            wrapper: Any = known.get("self")
            if hasattr(wrapper, "active_peft_config") and wrapper.get_base_model() is model:
                return wrapper, known
        frame = frame.f_back
    return None


def without_virtual(call: ForwardArguments, virtual: Virtual, past: int) -> ForwardArguments:
    """Return a call's arguments as they would be if the virtual tokens were padding, or not there.

    Args:
        call: the arguments of the model's forward.
        virtual: the virtual tokens.
        past: number of columns before this call, without virtual tokens that never were columns.

    Raises:
        AttachError: if virtual tokens would be placed between tokens, or it is unknown which tokens are padding.
    """
    if virtual.cached:
        return replace(
            call,
            mask=None if call.mask is None else call.mask[:, virtual.cached :],
            position_ids=None if call.position_ids is None else call.position_ids - virtual.cached,
        )
    inputs = call.inputs
    if not virtual.columns or inputs is None:
        return call
    if virtual.now and past:
        raise AttachError(
            f"PEFT puts its {virtual.now} virtual tokens before every call, and the cache holds {past} columns "
            "already, so they would be placed between tokens: use generate(), or call without a cache."
        )
    if call.hidden:
        raise AttachError(
            "The attention mask is not [rows, columns], and nothing else shows padding beside PEFT's virtual tokens: "
            "use generate() with its default cache."
        )
    mask = (
        torch.ones(inputs.shape[0], past + inputs.shape[1], device=inputs.device) if call.mask is None else call.mask
    )
    mask = torch.cat([mask.new_zeros(len(mask), virtual.columns), mask[:, virtual.columns :]], 1)
    ids = call.ids
    if virtual.now and virtual.ids is not None:
        ids = torch.cat([virtual.ids.new_full((len(virtual.ids), virtual.now), -1), virtual.ids], 1)
    return replace(call, mask=mask, ids=ids)
