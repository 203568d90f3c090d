"""Functions that run on a server, sent as source: they may use only torch, builtins and what is sent with them."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ...interventions import special_token_ids
from ...sites.slots import get_tensor, put_tensor
from ..attach import Attachment
from ..continuation import facts_of
from ..token_positions import number_tokens
from .plain_functions import BLOCK, by_value, portable


def sent(root: Any, stops: Any, special: Any, steps: Any, names: Any, caches: Any, get: Any, put: Any) -> Any:
    """Return the function that applies recorded interventions in every forward of a run.

    Args:
        root: the envoy of the causal LM.
        stops: for each site in order: its envoy, port and keys, whether it is written in place, the sites seen
            before, by number, and the recorded function with its constants; None for one that is only seen.
        special: ids of special tokens.
        steps: nnsight's steps.
        names: names of the model's positional arguments.
        caches: names of arguments under which this model takes a cache, whatever its type.
        get: `get_tensor`.
        put: `put_tensor`.
    """

    def carry() -> None:
        prompt = None
        for _ in steps[:]:
            args, kwargs = root.inputs
            call = dict(zip(names, args, strict=False))
            call.update(kwargs)
            tokens, prompt = tokens_of(call, prompt, special, caches)
            seen = []
            for envoy, port, keys, in_place, before, recorded, constants in stops:
                if port == "input":
                    args, kwargs = envoy.inputs
                    packed = {"args": args, "kwargs": dict(kwargs)}
                else:
                    packed = envoy.output
                raw = get(packed, keys)
                x = raw.detach().to("cpu", torch.float32).reshape(-1, 1, raw.shape[-1])
                seen.append(x)
                if recorded is None:
                    continue
                new = in_blocks(recorded, constants, [x, *tokens, *(seen[other] for other in before)])
                if raw.dtype == torch.float64:  # float32 would round it
                    delta = torch.where(new == x, torch.zeros_like(x), new - x).to(raw.dtype)
                    new = raw + delta.reshape(raw.shape).to(raw.device)
                new = new.to(raw.dtype).reshape(raw.shape).to(raw.device)
                if in_place:
                    raw.copy_(new)
                elif port == "input":
                    packed = put(packed, keys, new)
                    envoy.inputs = (packed["args"], packed["kwargs"])
                else:
                    envoy.output = put(packed, keys, new)

    return carry


def tokens_of(call: Any, prompt: Any, special: Any, caches: Any) -> Any:
    """Return the position and id of each token of a call, and where the prompt ends.

    Args:
        call: the call's arguments by name.
        prompt: number of the prompt's columns; None in the first call of a run.
        special: ids of special tokens.
        caches: names of arguments under which this model takes a cache, whatever its type.

    Returns:
        Index, prompt length, mask of special tokens and ids, ``[B * S, 1]`` each; and the prompt's columns.
    """
    ids, mask, places = call.get("input_ids"), call.get("attention_mask"), call.get("position_ids")
    inputs = ids if ids is not None else call["inputs_embeds"]
    past = 0
    for name, value in call.items():  # by its type, as names differ between versions of transformers
        if hasattr(value, "get_seq_length") or (name in caches and value is not None):
            past = int(value.get_seq_length())
    end = past + inputs.shape[1]
    boundary = prompt if prompt is not None else (past or end)
    hidden = mask is not None and mask.ndim != 2
    mask = None if hidden else mask
    places = places if places is not None and places.ndim == 2 else None
    index, absent, padded = number_tokens(
        mask, places, hidden, inputs, past, None, boundary, generating=prompt is not None
    )
    ids = torch.zeros_like(index) - 1 if ids is None else ids
    out = torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
    out = out | (index < 0) if padded else out
    length = (boundary - absent).expand(index.shape) if not isinstance(absent, int) else index * 0 + boundary
    return [each.reshape(-1, 1).to("cpu") for each in (index, length, out, ids)], prompt or end


def in_blocks(recorded: Any, constants: Any, inputs: Any) -> Any:
    """Apply a recorded function, which takes `BLOCK` tokens at once, to any number of them.

    Args:
        recorded: the function.
        constants: its constants.
        inputs: its other arguments, ``[n, ...]`` each.
    """
    count, done = inputs[0].shape[0], []
    for start in range(0, count, BLOCK):
        parts = [each[start : start + BLOCK] for each in inputs]
        missing = BLOCK - parts[0].shape[0]
        if missing:
            parts = [torch.cat([each, each.new_zeros((missing, *each.shape[1:]))]) for each in parts]
        done.append(recorded(constants, *parts)[: BLOCK - missing])
    return torch.cat(done)


def to_send(root: Any, envoys: Any, names: list[str], attachment: Attachment) -> Any:
    """Return a function without arguments that applies the interventions on another machine.

    Raises:
        AttachError: if they cannot be carried out by torch operations alone.
    """
    from nnsight.intervention.iterator import Iterations

    stops: list[tuple[Any, ...]] = []
    read: list[int] = []
    for position, (slot, envoy) in enumerate(zip(attachment.slots, envoys, strict=True)):
        recorded: Any = None
        constants: dict[str, Any] = {}
        if attachment.records.get(slot.tensor_path, ()):
            recorded, constants = portable(attachment, slot, [attachment.slots[other] for other in read])
        stops.append(
            (
                envoy,
                slot.tensor_path.port,
                slot.tensor_path.keys,
                slot.tensor_path.in_place,
                list(read),
                recorded,
                constants,
            )
        )
        if attachment.reads.get(slot.tensor_path, ()):
            read.append(position)
    tokens = by_value(tokens_of, number_tokens=by_value(number_tokens))
    return by_value(sent, tokens_of=tokens, in_blocks=by_value(in_blocks))(
        root,
        stops,
        special_token_ids(root._module),
        Iterations(),
        names,
        facts_of(root._module).caches,
        by_value(get_tensor),
        by_value(put_tensor),
    )


def as_sent(function: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the `__reduce__` value of an object that is unpickled as `function`."""
    return operator.getitem, ([function], 0)
