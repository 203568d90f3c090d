"""Compute the position of each token of a forward call in its row, from the call's arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..interventions import TokenContext, special_token_mask
from .running_call import ForwardArguments


def describe_tokens(
    model: nn.Module,
    call: ForwardArguments,
    *,
    past: int,
    previous: TokenContext | None,
    prompt: int | None,
    batch: int | None = None,
    special_ids: Tensor | None = None,
    beams: bool = False,
    virtual: int = 0,
    unknown_positions: str | None = None,
) -> TokenContext:
    """Compute the positions of a call's tokens from its arguments.

    Args:
        model: the causal LM.
        call: the arguments of its forward.
        past: number of columns before this call.
        previous: the call that ended with those columns, if it is known.
        prompt: number of columns of the prompt in `generate`; None elsewhere, where the first call is the prompt.
        batch: number of rows that `generate` was given; None elsewhere.
        special_ids: the model's special tokens ``[n]``, if they are known already.
        beams: whether `generate` reorders rows between calls.
        virtual: number of the row's first columns that are virtual tokens; the mask marks them as padding.
        unknown_positions: why the number of columns before this call is unknown; None if it is known.

    Returns:
        The context of the call.

    Raises:
        InputError: if neither ids nor embeddings are among the arguments, or if they hold no token.
    """
    inputs = call.inputs
    if inputs is None:
        raise InputError("The model was called without input_ids or inputs_embeds; expected one of them.")
    if inputs.ndim < 2 or not inputs.shape[1]:
        raise InputError(
            f"The model was called with an empty prompt or without a batch axis, {list(inputs.shape)}; expected "
            "[rows, tokens] with at least one token."
        )
    end = past + inputs.shape[1]
    boundary = prompt if prompt is not None else (past or end)
    numbered = _numbered(call, inputs, past, previous, boundary, prompt is not None)
    phase = "prompt" if end <= boundary else "generated" if past >= boundary else "mixed"
    return TokenContext(
        index=numbered.index,
        prompt_length=numbered.prompt_length,
        special=special_token_mask(model, call.ids, numbered.index >= 0 if numbered.padded else None, ids=special_ids),
        phase="packed" if call.packed else phase,
        end=end,
        ids=call.ids,
        batch=batch,
        beams=beams,
        prompt_columns=boundary - virtual,
        count=numbered.count,
        virtual=virtual,
        before=numbered.before,
        unknown_positions=unknown_positions,
    )


@dataclass(frozen=True)
class _Numbered:
    """Positions of the tokens of a call, see `TokenContext`, and whether some may be padding."""

    index: Tensor
    count: Tensor
    prompt_length: Tensor
    padded: bool
    before: Tensor | None = None


def _numbered(
    call: ForwardArguments, inputs: Tensor, past: int, previous: TokenContext | None, prompt: int, generating: bool
) -> _Numbered:
    """Return the positions of the tokens of a call."""
    step = _next_step(call, inputs, past, previous, prompt) if generating else None
    if step is not None and previous is not None:
        index, count, padded = step
        return _Numbered(index, count, previous.prompt_length, padded)
    if call.packed and call.position_ids is not None:
        index = call.position_ids.to(inputs.device).expand(inputs.shape[:2])
        return _Numbered(index, index.amax(-1, keepdim=True) + 1, index.new_full((len(index), 1), prompt), False)
    if not generating and not past and call.cache is None and call.mask is None and not call.hidden:
        several = None if call.position_ids is None else number_sequences(call.position_ids.to(inputs.device))
        if several is not None:
            rows = len(inputs)
            index, lengths, before = (each.expand(rows, -1) for each in several)
            return _Numbered(index, index.amax(-1, keepdim=True) + 1, lengths, False, before)
    index, absent, padded = number_tokens(
        call.mask, call.position_ids, call.hidden, inputs, past, previous, prompt, generating=generating
    )
    count = index.amax(-1, keepdim=True) + 1
    if previous is not None and previous.count is not None and previous.count.shape == count.shape:
        count = torch.maximum(count, previous.count.to(count.device))  # this call may hold only padding
    return _Numbered(index, count, prompt - absent, padded)


def number_sequences(places: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the positions of tokens in rows that hold several sequences one after the other; None if no row does.

    As in transformers without mask and cache (`find_packed_sequence_indices`), a sequence begins wherever a position
    id is not its predecessor plus one.

    Args:
        places: `position_ids` ``[B, S]``.

    Returns:
        The position of each token in its sequence, the length of that sequence, and the number of tokens of the row
        before the sequence, ``[B, S]`` each.
    """
    begins = places.diff(dim=-1, prepend=places[:, :1] - 1) != 1
    if not bool(begins.any()):
        return None
    columns = torch.arange(places.shape[1], device=places.device).expand_as(places)
    before = torch.where(begins, columns, 0).cummax(-1).values
    sequence = begins.cumsum(-1)
    sizes = places.new_zeros(len(places), places.shape[1] + 1).scatter_add_(1, sequence, torch.ones_like(places))
    return columns - before, sizes.gather(1, sequence), before


def _next_step(
    call: ForwardArguments, inputs: Tensor, past: int, previous: TokenContext | None, prompt: int
) -> tuple[Tensor, Tensor, bool] | None:
    """Return the positions of one more token per row of a generation, the rows' numbers of real tokens, and a flag.

    The flag says whether the new tokens may be padding. None if the call is not such a step. `number_tokens` gives the
    same for every call, but takes several times the operations.
    """
    if previous is None or previous.count is None or previous.count.device != inputs.device:
        return None
    if inputs.shape[1] != 1 or not previous.end == past >= prompt or previous.count.shape[0] != inputs.shape[0]:
        return None
    mask = call.mask
    if mask is None:  # left out, or hidden by a static cache: new tokens are real
        return previous.count, previous.count + 1, False
    if mask.shape[1] <= past:
        return None
    real = mask[:, past : past + 1].to(inputs.device) != 0
    return torch.where(real, previous.count, -1), previous.count + real, True


def number_tokens(
    mask: Tensor | None,
    places: Tensor | None,
    hidden: bool,
    inputs: Tensor,
    past: int,
    previous: TokenContext | None,
    prompt: int,
    *,
    generating: bool,
) -> tuple[Tensor, Tensor, bool]:
    """Return positions among each row's real tokens (-1 at padding), the prompt's padding, and if there may be any.

    Positions count from 0 even where the position ids begin elsewhere.

    Args:
        mask: 0 at padding ``[B, T]``; None if it is unknown.
        places: `position_ids` ``[B, S]``; None if they were left out.
        hidden: whether there is a mask that does not show padding.
        inputs: ids or embeddings ``[B, S, ...]``.
        past: number of columns before the call.
        previous: the call that ended with those columns, if it is known.
        prompt: number of columns of the prompt.
        generating: whether `generate` makes the call, whose position ids count each row's real tokens from 0.
    """
    rows, columns = inputs.shape[:2]
    end = past + columns
    column = torch.arange(past, end, device=inputs.device).expand(rows, columns)
    absent = torch.zeros(rows, 1, dtype=torch.int64, device=inputs.device)
    padded = previous is not None and previous.index.shape[0] == rows
    if previous is not None and padded:
        absent = past - 1 - previous.index[:, -1:].to(inputs.device)
    if mask is not None:
        real = (mask != 0).to(inputs.device).long()
        if real.shape[1] < end:  # it covers only the new tokens
            before, now = past - absent, real
            absent = absent + (1 - real).sum(-1, keepdim=True)
        else:
            before, now = real[:, :past].sum(-1, keepdim=True), real[:, past:end]
            absent = (1 - real[:, :prompt]).sum(-1, keepdim=True)
        return (before + now.cumsum(-1) - 1).masked_fill(now == 0, -1), absent, True
    if places is not None and places.shape[1] == columns and (generating or hidden or (past and not padded)):
        # A static cache hides the mask. Padding is then on the left, and reduces the position ids by its length.
        absent = (end - 1 - places.to(inputs.device).expand(rows, columns)[:, -1:]).clamp(min=0)
        padded = True
    return (column - absent).clamp(min=-1), absent, padded
