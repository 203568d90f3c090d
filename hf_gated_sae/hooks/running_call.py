"""Read the arguments of a running forward call, and tell whether it still runs.

No other file of the hooks reads arguments by name, except for the batches that we make ourselves. Libraries rename
arguments (transformers 5.24 calls `cache` what was `past_key_values`), and an edit at a position would then silently
reach another token. So a cache is recognised by its type, or because the model returns it under the same name, and an
unknown argument that may be a cache, a padding mask or positions is refused.

| fact | read from |
|---|---|
| the tokens | ``input_ids``, else ``inputs_embeds`` |
| padding | ``attention_mask`` ``[B, T]``; another shape hides it |
| positions in the sequence | ``position_ids`` ``[B, S]`` |
| what came before | a cache, under any name |
| several requests in one row | ``cu_seq_lens_q``, ``cu_seqlens``, ``read_index`` |
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from ..errors import AttachError
from ..upstream.torch_private import MODULE_CALL

TOKENS = ("input_ids", "inputs_embeds")
MASK = "attention_mask"
PLACES = "position_ids"
PACKED = ("cu_seq_lens_q", "cu_seqlens", "read_index")

_OF_CACHES = ("cache", "past", "state", "mem")
"""A container of tensors is refused, as it may be a cache, if its name contains one of these."""
_OF_OTHER_INPUTS = (
    *("encoder", "cross", "image", "audio", "video", "pixel", "vision", "visual", "speech", "feature", "mm_"),
    *("head", "label", "loss", "embed", "row", "perm"),
)
"""Masks, positions and containers whose name contains one of these belong to other inputs than the tokens."""


@dataclass(frozen=True)
class ForwardArguments:
    """The arguments of a forward call that the hooks use.

    Attributes:
        ids: token ids ``[B, S]``; None where the model is fed embeddings.
        embeds: embeddings ``[B, S, width]``; None where it is fed ids.
        mask: 0 at padding, ``[B, T]``; None if it was left out or is `hidden`.
        hidden: whether a mask of another shape was given, which does not show padding.
        position_ids: ``[B, S]`` or ``[1, S]``; None if they were left out.
        cache: the cache of earlier tokens; None if there is none.
        packed: whether a row holds tokens of several requests or sequences, with their boundaries given.
    """

    ids: Tensor | None = None
    embeds: Tensor | None = None
    mask: Tensor | None = None
    hidden: bool = False
    position_ids: Tensor | None = None
    cache: Any = None
    packed: bool = False

    @property
    def inputs(self) -> Tensor | None:
        """The ids, or else the embeddings; None if there are neither."""
        return self.ids if self.ids is not None else self.embeds


@dataclass(frozen=True)
class CallFacts:
    """The proven facts about a model's calls, see `continuation`.

    Attributes:
        caches: names under which it takes and returns a cache that is not transformers' `Cache`, such as RWKV's state.
        padding: what left-padded rows need to give the same results as each row alone: ``"position_ids"``, or
            ``"right"`` if only padding on that side helps; None if they need nothing.
        wrong: evidence that its calls are misread; None if there is none, or it has no cache.
        differs: how far its logits with a cache are from those without, relative to the largest; None if they agree.
    """

    caches: tuple[str, ...] = ()
    padding: str | None = None
    wrong: str | None = None
    differs: float | None = None


def by_name(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name.

    Args:
        forward: the function that a class defines, with ``self`` as its first parameter.
        args: positional arguments without ``self``.
        kwargs: the others.
    """
    # Binding would refuse names that a decorator of the forward still accepts.
    names = [
        name
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


def read(call: Mapping[str, Any], caches: Collection[str] = ()) -> ForwardArguments:
    """Return the arguments of a forward call that the hooks use.

    Args:
        call: arguments by name.
        caches: names under which the model takes a cache that is not transformers' `Cache`.

    Raises:
        AttachError: if an unknown argument may be one of these.
    """
    ids, embeds, mask, places = (call.get(name) for name in (*TOKENS, MASK, PLACES))
    packed = any(call.get(name) is not None for name in PACKED)
    cache = None if packed else _the_cache(call, caches)  # requests share the cache of an engine
    found = ForwardArguments(
        ids=ids if isinstance(ids, Tensor) else None,
        embeds=embeds if isinstance(embeds, Tensor) else None,
        mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        hidden=mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2),
        position_ids=places if isinstance(places, Tensor) and places.ndim == 2 else None,
        cache=cache,
        packed=packed,
    )
    _refuse_unknown(call, found)
    return found


def cache_in(values: Mapping[str, Any], names: Collection[str] = ()) -> Any:
    """Return the cache among a call's arguments, or a model's outputs; None if there is none.

    Args:
        values: arguments or outputs by name.
        names: names under which the model takes and returns a cache that is not transformers' `Cache`.
    """
    return next(iter(_caches_in(values, names).values()), None)


def _caches_in(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the different caches among values, by the name of each."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        known = is_cache(value) or (name in names and _holds_tensors(value))
        if known and all(value is not other for other in found.values()):
            found[name] = value
    return found


def _the_cache(call: Mapping[str, Any], names: Collection[str]) -> Any:
    """Return the cache of a call; None if there is none.

    Raises:
        AttachError: if there are several, or an unknown argument may be one.
    """
    found = _caches_in(call, names)
    for name, value in call.items():
        if name not in names and _may_be_cache(name, value):
            raise AttachError(
                f"The model was called with {name}=, a {type(value).__name__} that holds tensors and may be a cache. "
                "The number of tokens in it is unknown, so positions would be wrong: use a transformers Cache, or "
                "use_cache=False."
            )
    if len(found) > 1:
        raise AttachError(
            f"The model was called with several caches, {', '.join(f'{name}=' for name in found)}, but uses only one, "
            "so the wrong tokens would be edited. PEFT's prompt and prefix tuning do this if they do not support this "
            "version of transformers: call generate(..., use_cache=False), or install compatible versions."
        )
    return next(iter(found.values()), None)


def is_cache(value: Any) -> bool:
    """Whether something is a cache by its type: transformers' own, or a class that behaves or is named like one."""
    if isinstance(value, Cache):
        return True
    if value is None or isinstance(value, (Tensor, nn.Module, str, bool, int, float, list, tuple, dict)):
        return False
    return callable(getattr(value, "get_seq_length", None)) or type(value).__name__.endswith("Cache")


def _may_be_cache(name: str, value: Any) -> bool:
    """Whether something is a container of tensors that may be a cache, by its name or as it is nested by layers."""
    if not isinstance(value, (list, tuple, dict)) or any(part in name for part in _OF_OTHER_INPUTS) or name == MASK:
        return False
    named = any(part in name for part in _OF_CACHES)
    layers = list(value.values() if isinstance(value, dict) else value)
    nested = (
        not isinstance(value, dict) and len(layers) > 0 and all(isinstance(each, (list, tuple)) for each in layers)
    )
    return (named or nested) and _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    return next(tensors_within(value), None) is not None


def tensors_within(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in the attributes of a cache and of its layers."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth < 0 or value is None or isinstance(value, (nn.Module, str, bytes, bool, int, float)):
        return
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in parts:
        yield from tensors_within(part, depth - 1)


def _refuse_unknown(call: Mapping[str, Any], found: ForwardArguments) -> None:
    """Raise if an argument may be a padding mask or position ids under an unknown name.

    Raises:
        AttachError: naming it.
    """
    inputs = found.inputs
    if inputs is None or inputs.ndim < 2:
        return
    rows, columns = inputs.shape[:2]
    for name, value in call.items():
        if name in (*TOKENS, MASK, PLACES) or any(part in name for part in _OF_OTHER_INPUTS):
            continue
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] not in (1, rows):
            continue
        is_mask = "mask" in name and found.mask is None and not found.hidden and value.shape[1] >= columns
        is_places = "position" in name and found.position_ids is None and value.shape[1] == columns
        if is_mask or is_places:
            known = MASK if is_mask else PLACES
            raise AttachError(
                f"The model was called with {name}= {list(value.shape)}, an unknown argument that may contain "
                f"{'the padding mask' if is_mask else 'the positions of the tokens'}, so positions could be wrong. "
                f"Expected it as {known}=; newer transformers may need a newer hf-gated-sae."
            )


def call_frame() -> FrameType | None:
    """Return the interpreter frame of the module call whose hook is running; None if it is not found."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    return frame


def is_running(frame: FrameType | None) -> bool:
    """Whether this thread is within the call that runs in a frame; True if the frame is unknown."""
    if frame is None:
        return True
    within: FrameType | None = sys._getframe(1)
    while within is not None and within is not frame:
        within = within.f_back
    return within is not None
