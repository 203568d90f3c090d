"""Which tokens of a call are meant. Positions are absolute: they mean the same token with and without a KV cache."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import AttachError, InputError, unknown_name

Positions: TypeAlias = "str | int | Sequence[int]"
"""``"all"``, ``"prompt"``, ``"generated"``, ``"last_prompt"``, or token positions (negative: from the prompt's end).

Positions count a row's real tokens from 0, padding left out. The prompt is what `generate` is given; in a decoding
loop of one's own it is the first call, the one with an empty cache.
"""

NAMED_POSITIONS = ("all", "prompt", "generated", "last_prompt")


@dataclass(frozen=True)
class TokenContext:
    """The tokens that one forward call computes.

    Attributes:
        index: position of each token in its own row, counted over real tokens, ``[B, S]`` int64.
        prompt_length: number of real tokens in each row's prompt, ``[B, 1]`` int64.
        special: True at padding and special tokens, ``[B, S]`` bool; None if there are none.
        phase: ``"prompt"`` or ``"generated"`` if the whole call is one or the other, ``"mixed"`` if it holds both,
            ``"packed"`` if a row holds several sequences.
        end: number of columns after this call, those in the cache included.
    """

    index: Tensor
    prompt_length: Tensor
    special: Tensor | None
    phase: str
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the call."""
        return self.index.shape[0], self.index.shape[1]

    def select(self, positions: Positions, *, special_tokens: bool) -> Tensor | bool:
        """Return which tokens are meant.

        Args:
            positions: as an intervention states them.
            special_tokens: whether padding and special tokens count.

        Returns:
            A mask ``[B, S]``, or True for all tokens, or False for none (known without looking at a tensor).
        """
        chosen = self._chosen(positions)
        if chosen is False or special_tokens or self.special is None:
            return chosen
        return ~self.special if chosen is True else chosen & ~self.special

    def _chosen(self, positions: Positions) -> Tensor | bool:
        if positions == "all":
            return True
        if self.phase == "packed" and (isinstance(positions, str) or min(_several(positions), default=0) < 0):
            raise AttachError(
                f"positions={positions!r} needs to know where each prompt ends, and this call packs several sequences "
                "into one row (continuous batching, padding-free training); use 'all' or positions from 0 on."
            )
        if positions in ("prompt", "generated"):
            if self.phase != "mixed":
                return self.phase == positions
            in_prompt = self.index < self.prompt_length
            return in_prompt if positions == "prompt" else ~in_prompt
        if positions == "last_prompt":
            return False if self.phase == "generated" else self.index == self.prompt_length - 1
        wanted = self.index.new_tensor(_several(positions))
        from_start, from_end = wanted[wanted >= 0], wanted[wanted < 0]
        mask = torch.isin(self.index, from_start) | torch.isin(self.index - self.prompt_length, from_end)
        return mask & (self.index >= 0)


def _several(positions: Positions) -> Sequence[int]:
    return [positions] if isinstance(positions, int) else [int(position) for position in positions]


def shorten(value: object) -> str:
    """Return a value as a message shows it: one line of at most 80 characters."""
    return " ".join(repr(value).split())[:80]


def integers(values: object) -> tuple[int, ...] | None:
    """Return whole numbers, given one or an iterable of them; None if anything else is among them."""
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        return None  # a mask, not indices
    try:
        several = tuple(values) if isinstance(values, Iterable) else (values,)
        return None if any(isinstance(each, bool) for each in several) else tuple(map(operator.index, several))
    except TypeError:
        return None


def check_positions(positions: Any) -> Positions:
    """Return what `TokenContext.select` understands, a copy of what the caller could change.

    Raises:
        InputError: with close matches for a mistyped name.
    """
    if isinstance(positions, str):
        if positions not in NAMED_POSITIONS:
            raise unknown_name("position selector", positions, NAMED_POSITIONS)
        return positions
    found = integers(positions)
    if found is None:
        raise InputError(
            f"positions is {shorten(positions)}; expected one of {', '.join(map(repr, NAMED_POSITIONS))} or token "
            "positions such as [0, 3, -1]."
        )
    return found


def special_token_ids(model: Any) -> list[int]:
    """Return the BOS, EOS and padding ids that the model's own configurations name."""
    found: set[int] = set()
    own = getattr(model, "config", None)
    text = own.get_text_config() if own is not None else None  # of a model that also sees or hears
    for config in (own, text, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [int(value)])
    return sorted(found)


def special_token_mask(model: Any, input_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None:
    """Return which tokens are padding or special, and so are left out of edits and statistics by default.

    Args:
        model: the causal LM, asked for its special token ids.
        input_ids: ``[B, S]``; None where the model is fed embeddings.
        attention_mask: ``[B, T]`` with ``T >= S``, 0 at padding; its last `S` columns belong to `input_ids`.

    Returns:
        Mask ``[B, S]``, True at tokens to leave out; None if nothing is known to be special.
    """
    masks = []
    if attention_mask is not None and attention_mask.ndim == 2:
        masks.append(attention_mask == 0)
    ids = special_token_ids(model)
    if input_ids is not None and ids:
        masks.append(torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)))
    if len(masks) == 2:
        return masks[0][:, -masks[1].shape[1] :].to(masks[1].device) | masks[1]
    return masks[0] if masks else None
