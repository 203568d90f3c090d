"""Batches of tokens: how they are given to a causal LM and which of their positions count."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, ShapeError
from ..interventions import special_token_mask
from ..sites.probe import unwrap
from .peft_virtual_tokens import takes_positions
from .running_call import MASK, PLACES
from .token_positions import number_sequences

TokenBatch: TypeAlias = "Tensor | Mapping[str, Any]"
"""Token ids ``[B, S]`` or ``[S]``, or the keyword arguments of a forward call, ``input_ids`` among them."""

TokenBatches: TypeAlias = Iterable[TokenBatch]


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Turn a batch into the keyword arguments of the model's forward call.

    Args:
        model: the causal LM.
        batch: token ids, or a mapping as tokenizers return it; labels in it are left out.

    Returns:
        Keyword arguments on the model's device, ``input_ids [B, S]`` among them; with ``position_ids`` if padding
        precedes tokens, see `with_positions`.

    Raises:
        InputError: if there are no token ids.
        ShapeError: if they are not a batch of sequences.
    """
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) if isinstance(batch, Mapping) else {}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        raise InputError(
            f"A batch of tokens is a {type(batch).__name__} with {', '.join(map(repr, given)) or 'no keys'}; expected "
            "token ids as a tensor, or a mapping with 'input_ids' (tokenizers return one with return_tensors='pt')."
        )
    if ids.ndim == 1:
        given["input_ids"] = ids = ids.unsqueeze(0)
    if ids.ndim != 2 or ids.is_floating_point():
        raise ShapeError(f"Given input_ids {list(ids.shape)} of {ids.dtype}; expected integer token ids [B, S].")
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 1:
        given["attention_mask"] = mask = mask.unsqueeze(0)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != ids.shape:
        raise ShapeError(
            f"Given input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}; expected the same shape."
        )
    return {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in with_positions(model, given).items()
        if key != "labels"
    }


def with_positions(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Add ``position_ids`` to a call's arguments if padding precedes some of its tokens.

    Without ``position_ids`` most models count positions over columns, padding included, so that a row that is padded
    on its left gets other activations than the same row alone. `generate` derives them from the mask; so does this.

    Args:
        model: the causal LM, as it is called.
        inputs: keyword arguments of its forward.

    Returns:
        The arguments; unchanged if no padding precedes a token, if positions are given, or if the forward does not
        take them as ``[B, S]``, in which case the model uses the mask.
    """
    given = dict(inputs)
    mask = given.get("attention_mask")
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if given.get("position_ids") is not None or not isinstance(tokens, Tensor):
        return given
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < tokens.shape[1] or not takes_positions(model):
        return given
    real = mask != 0
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return given
    first = _first_position(unwrap(model)[0])
    if first is None:
        return given
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return {**given, "position_ids": positions.to(tokens.device) + first}


_FIRST: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def _first_position(root: nn.Module) -> int | None:
    """Return the position of a row's first token; None for a model whose forward takes no positions ``[B, S]``."""
    if root not in _FIRST:
        first: int | None = 0 if "position_ids" in inspect.signature(type(root).forward).parameters else None
        for module in root.modules() if first is not None else ():
            if hasattr(module, "create_position_ids_from_input_ids"):  # RoBERTa reserves positions for padding
                first = int(module.padding_idx) + 1  # type: ignore[arg-type]  # nn.Module says Tensor
            elif hasattr(module, "get_rope_index"):  # it computes its own, in several dimensions
                first = None
                break
        _FIRST[root] = first
    return _FIRST[root]


def counted_positions(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    special_tokens: bool = False,
    special_ids: Sequence[int] | None = None,
) -> Tensor:
    """Return which positions count: by default all but padding and special tokens.

    Args:
        model: the causal LM.
        inputs: from `model_inputs`, or what else its forward takes: ``inputs_embeds`` instead of ``input_ids``.
        special_tokens: count special tokens too; padding never counts.
        special_ids: which tokens are special; those of the model by default, see `special_token_ids`.

    Returns:
        Mask ``[B, S]``, True at positions that count.
    """
    ids, attention = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = ids if ids is not None else inputs["inputs_embeds"][..., 0]
    every = torch.ones_like(tokens, dtype=torch.bool)
    attention = attention if isinstance(attention, Tensor) and attention.ndim == 2 else None
    if special_tokens:
        return every if attention is None else attention[:, -tokens.shape[1] :].to(tokens.device) != 0
    special = special_token_mask(
        model, ids, attention, ids=None if special_ids is None else torch.tensor(special_ids, dtype=torch.int64)
    )
    return every if special is None else ~special[:, -tokens.shape[1] :]


def sequences_in_rows(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the number of each token's sequence, and its position among that sequence's real tokens, both from 0 on.

    A row is one sequence, unless there is no mask and its `position_ids` restart within it, as where transformers
    packs several sequences into one row.

    Args:
        inputs: from `model_inputs`.

    Returns:
        Numbers of sequences from 0 on, in the order of rows and columns, and positions; ``[B, S]`` int64 each.
    """
    ids, mask = inputs["input_ids"], inputs.get(MASK)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return rows.expand_as(ids), (mask != 0).long().cumsum(-1) - 1
    places = inputs.get(PLACES)
    packed = number_sequences(places.expand_as(ids)) if isinstance(places, Tensor) and places.ndim == 2 else None
    if packed is None:
        return rows.expand_as(ids), torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = packed[0]
    return (positions == 0).flatten().cumsum(0).view_as(positions) - 1, positions
