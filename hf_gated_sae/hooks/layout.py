"""Where each token of a forward call stands in its row, worked out from the call's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..interventions import TokenContext, special_token_mask

# Arguments that tell that one row holds the tokens of several sequences.
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "read_index")


def describe_tokens(
    model: nn.Module,
    call: Mapping[str, Any],
    *,
    past: int,
    previous: TokenContext | None,
    prompt: int | None,
    batch: int | None = None,
    special_ids: Tensor | None = None,
    beams: bool = False,
    virtual: int = 0,
) -> TokenContext:
    """Work out the positions of a call's tokens from its arguments.

    Args:
        model: the causal LM.
        call: arguments of its forward by name.
        past: number of columns before this call.
        previous: the call that ended with those columns, if it is known.
        prompt: number of columns of the prompt in `generate`; None elsewhere, where the first call is the prompt.
        batch: number of rows that `generate` was given; None elsewhere.
        special_ids: the model's special tokens ``[n]``, where they are known already.
        beams: whether `generate` reorders rows between calls.
        virtual: number of the row's first columns that are virtual tokens; the mask says that they are padding.

    Returns:
        The context of the call.

    Raises:
        InputError: if neither ids nor embeddings are among the arguments, or if they hold no token.
    """
    input_ids = call.get("input_ids")
    inputs = input_ids if input_ids is not None else call.get("inputs_embeds")
    if not isinstance(inputs, Tensor):
        raise InputError("The model was called without input_ids or inputs_embeds; expected one of them.")
    if inputs.ndim < 2 or not inputs.shape[1]:
        raise InputError(
            f"The model was called with an empty prompt or without a batch axis, {list(inputs.shape)}; expected "
            "[rows, tokens] with at least one token."
        )
    end = past + inputs.shape[1]
    boundary = prompt if prompt is not None else (past or end)
    index, count, prompt_length, padded = _numbered(call, inputs, past, previous, boundary, prompt is not None)
    if any(call.get(name) is not None for name in _PACKED):
        phase = "packed"
    else:
        phase = "prompt" if end <= boundary else "generated" if past >= boundary else "mixed"
    return TokenContext(
        index=index,
        prompt_length=prompt_length,
        special=special_token_mask(model, input_ids, index >= 0 if padded else None, ids=special_ids),
        phase=phase,
        end=end,
        ids=input_ids,
        batch=batch,
        beams=beams,
        prompt_columns=boundary - virtual,
        count=count,
        virtual=virtual,
    )


def _numbered(
    call: Mapping[str, Any], inputs: Tensor, past: int, previous: TokenContext | None, prompt: int, generating: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return positions, the rows' numbers of real tokens and lengths of prompts, and if there may be padding."""
    step = _next_step(call, inputs, past, previous, prompt) if generating else None
    if step is not None and previous is not None:
        index, count, padded = step
        return index, count, previous.prompt_length, padded
    index, absent, padded = number_tokens(call, inputs, past, previous, prompt, generating=generating)
    count = index.amax(-1, keepdim=True) + 1
    if previous is not None and previous.count is not None and previous.count.shape == count.shape:
        count = torch.maximum(count, previous.count.to(count.device))  # this call may hold padding alone
    return index, count, prompt - absent, padded


def _next_step(
    call: Mapping[str, Any], inputs: Tensor, past: int, previous: TokenContext | None, prompt: int
) -> tuple[Tensor, Tensor, bool] | None:
    """Return the positions of one more token per row of a generation, the rows' numbers of real tokens, and a flag.

    The flag says whether the new tokens may be padding. None where this is not such a step. `number_tokens` says the
    same, of every call, in several times the operations.
    """
    if previous is None or previous.count is None or previous.count.device != inputs.device:
        return None
    if inputs.shape[1] != 1 or not previous.end == past >= prompt or previous.count.shape[0] != inputs.shape[0]:
        return None
    mask = call.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # left out, or hidden by a static cache: what is new is real
        return previous.count, previous.count + 1, False
    if mask.shape[1] <= past:
        return None
    real = mask[:, past : past + 1].to(inputs.device) != 0
    return torch.where(real, previous.count, -1), previous.count + real, True


def number_tokens(
    call: Mapping[str, Any], inputs: Tensor, past: int, previous: TokenContext | None, prompt: int, *, generating: bool
) -> tuple[Tensor, Tensor, bool]:
    """Return positions among each row's real tokens (-1 at padding), the prompt's padding, if there may be any."""
    rows, columns = inputs.shape[:2]
    end = past + columns
    column = torch.arange(past, end, device=inputs.device).expand(rows, columns)
    absent = torch.zeros(rows, 1, dtype=torch.int64, device=inputs.device)
    padded = previous is not None and previous.index.shape[0] == rows
    if previous is not None and padded:
        absent = past - 1 - previous.index[:, -1:].to(inputs.device)
    mask, places = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = (mask != 0).to(inputs.device).long()
        if real.shape[1] < end:  # of the new tokens only
            before, now = past - absent, real
            absent = absent + (1 - real).sum(-1, keepdim=True)
        else:
            before, now = real[:, :past].sum(-1, keepdim=True), real[:, past:end]
            absent = (1 - real[:, :prompt]).sum(-1, keepdim=True)
        return (before + now.cumsum(-1) - 1).masked_fill(now == 0, -1), absent, True
    if isinstance(places, Tensor) and places.ndim == 2 and places.shape[1] == columns:
        places = places.to(inputs.device).expand(rows, columns)
        if not generating:
            return places, absent, False
        absent = end - 1 - places[:, -1:]  # a static cache hides the mask, and padding is on the left
        padded = True
    return (column - absent).clamp(min=-1), absent, padded
