"""Select tokens of a call by position. Positions are absolute: the same with and without a KV cache."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import AttachError, InputError, unknown_name


@dataclass(frozen=True)
class TokenIds:
    """Positions of all occurrences of some tokens.

    Attributes:
        ids: token ids, such as ``TokenIds([13, 198])``. BOS, EOS and padding are excluded even if they are listed,
            unless the intervention has ``special_tokens=True``.
    """

    ids: Sequence[int]

    def __post_init__(self) -> None:
        """Check the ids."""
        found = integers(self.ids)
        if not found or min(found) < 0:
            raise InputError(f"TokenIds was given {shorten(self.ids)}; expected token ids, such as [13, 198].")
        object.__setattr__(self, "ids", tuple(dict.fromkeys(found)))


Positions: TypeAlias = "str | int | Sequence[int] | slice | TokenIds | Tensor"
"""Which tokens: a name, token positions, a span of them, token ids, or a mask.

* ``"all"``, ``"prompt"``, ``"generated"``, ``"last_prompt"``.
* ``3`` or ``[0, 3, -1]``: token positions; negative ones count from the prompt's end.
* ``slice(2, 8)``, ``slice(-4, None)``: from one position up to, not including, another; negative ones count from the
  prompt's end, and an open end has no bound: ``slice(-4, None)`` is the prompt's last four tokens and all generated
  ones, ``range(-4, 0)`` only the four.
* ``TokenIds([13, 198])``: all occurrences of these tokens.
* a bool tensor ``[S]`` or ``[B, S]`` over the columns of the batch, padding included; later columns are not selected.

Positions count a row's real tokens from 0, without padding. The prompt is the input of `generate`; in a custom
decoding loop it is the first call, with an empty cache.
"""

NAMED_POSITIONS = ("all", "prompt", "generated", "last_prompt")
_KINDS = "token positions such as [0, 3, -1], a slice, TokenIds([13]), or a bool tensor [S] or [B, S]"


@dataclass(frozen=True)
class TokenContext:
    """The tokens that one forward call computes.

    Attributes:
        index: position of each token in its own row, counted over real tokens, ``[B, S]`` int64.
        prompt_length: number of real tokens in each row's prompt, ``[B, 1]`` int64; with several sequences in a row,
            in each token's sequence, ``[B, S]``.
        special: True at padding and at the model's special tokens, ``[B, S]`` bool; None if there are none.
        phase: ``"prompt"`` or ``"generated"`` if the whole call is one or the other, ``"mixed"`` if it has both,
            ``"packed"`` if a row has several sequences.
        end: number of columns up to the end of this call, those in the cache included.
        ids: token ids ``[B, S]``; None if the model is called with embeddings.
        batch: number of rows of the caller's batch; `generate` may run several copies of each, in adjacent rows.
        beams: whether `generate` may reorder the rows between this call and the next.
        prompt_columns: number of columns of the prompt, padding included; None if it is not known.
        count: number of real tokens of each row up to the end of this call, ``[B, 1]``; None if it is not known.
        virtual: number of virtual tokens at the start of each row, which are not in the caller's batch.
        before: with several sequences in a row, the number of tokens before each token's own sequence, ``[B, S]``
            int64; else None.
        unknown_positions: why the tokens' positions are not known; None if they are.
    """

    index: Tensor
    prompt_length: Tensor
    special: Tensor | None
    phase: str
    end: int
    ids: Tensor | None = None
    batch: int | None = None
    beams: bool = False
    prompt_columns: int | None = None
    count: Tensor | None = None
    virtual: int = 0
    before: Tensor | None = None
    unknown_positions: str | None = None
    _special_of: dict[tuple[int, ...], Tensor | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the call."""
        return self.index.shape[0], self.index.shape[1]

    def select(
        self,
        positions: Positions,
        *,
        special_tokens: bool,
        rows: Sequence[int] | None = None,
        special_ids: Sequence[int] | None = None,
    ) -> Tensor | bool:
        """Return which tokens are selected.

        Args:
            positions: the positions of an intervention.
            special_tokens: whether padding and special tokens may be selected.
            rows: rows of the caller's batch; None for all.
            special_ids: the special tokens; None for those of the model.

        Returns:
            A mask ``[B, S]``, or True for all tokens, or False for none (if that is known without reading a tensor).
        """
        chosen = self._position_mask(positions)
        if chosen is False:
            return False
        parts = [chosen] if isinstance(chosen, Tensor) else []
        if rows is not None:
            parts.append(self.in_rows(rows))
        special = None if special_tokens else self.special_among(special_ids)
        if special is not None:
            parts.append(~special)
        if not parts:
            return True
        mask = functools.reduce(torch.logical_and, parts)
        return mask if mask.shape == self.shape else mask.expand(self.shape)

    def special_among(self, ids: Sequence[int] | None) -> Tensor | None:
        """Return which tokens are padding or special, ``[B, S]``; None if there are none.

        Args:
            ids: the special tokens, such as those that an SAE has recorded; None for those of the model.
        """
        if ids is None:
            return self.special
        key = tuple(ids)
        if key not in self._special_of:
            parts = [] if self.special is None else [self.index < 0]  # with padding, there would be a mask
            if key and self.ids is not None:
                parts.append(torch.isin(self.ids, self.ids.new_tensor(key)))
            self._special_of[key] = functools.reduce(torch.logical_or, parts) if parts else None
        return self._special_of[key]

    def in_rows(self, rows: Sequence[int]) -> Tensor:
        """Return which rows of this call belong to some rows of the caller's batch, ``[B, 1]``.

        Raises:
            InputError: if the batch has no such rows.
            AttachError: if the call packs several sequences into one row.
        """
        if self.phase == "packed":
            raise AttachError(
                f"rows={list(rows)} cannot be distinguished: this call packs several sequences into one row "
                "(continuous batching, padding-free training). Omit rows= to act on all of them."
            )
        batch = self.batch_rows
        if max(rows) >= batch:
            raise InputError(f"rows={list(rows)} names row {max(rows)}, but the batch has {batch}, 0 .. {batch - 1}.")
        owners = self.owners
        return torch.isin(owners, owners.new_tensor(list(rows))).unsqueeze(-1)

    @property
    def batch_rows(self) -> int:
        """Number of rows of the caller's batch."""
        running = self.shape[0]
        return self.batch if self.batch and running % self.batch == 0 else running

    @property
    def batch_columns(self) -> range:
        """The numbers of this call's columns in the caller's batch; those of virtual tokens are below 0."""
        return range(self.end - self.shape[1] - self.virtual, self.end - self.virtual)

    @property
    def owners(self) -> Tensor:
        """For each row of this call, its row in the caller's batch, ``[B]`` int64."""
        running = self.shape[0]
        return torch.arange(running, device=self.index.device) // (running // self.batch_rows)

    def of_rows(self, values: Tensor, what: str) -> Tensor:
        """Return the values for this call's rows from values for the rows of the caller's batch.

        Args:
            values: ``[B, ...]``, one for each row of the caller's batch.
            what: their name for messages.

        Returns:
            ``[B, ...]`` for the rows of this call, on the device of its tokens.

        Raises:
            InputError: if it has another number of rows than the batch.
            AttachError: if the call packs several sequences into one row.
        """
        if self.phase == "packed":
            raise AttachError(
                f"{what} is given by rows, and this call packs several sequences into one row (continuous batching, "
                "padding-free training): use one number for all of them."
            )
        if len(values) != self.batch_rows:
            raise InputError(
                f"{what} has {len(values)} numbers, and the batch has {self.batch_rows} rows; expected one per row."
            )
        return values.to(self.index.device)[self.owners]

    def columns_of(self, values: Tensor, what: str, fill: Any = 0) -> Tensor:
        """Return the values for this call's tokens from values for the columns of the caller's batch.

        Args:
            values: values for the batch's columns from the first one on, ``[S]``, ``[B, S]`` or ``[B, S, ...]``.
            what: their name for messages.
            fill: value for columns that `values` does not have.

        Returns:
            ``[B, S]`` and the further axes, for this call's rows and columns.

        Raises:
            InputError: if it has another number of rows than the batch.
            AttachError: if the call packs several sequences into one row.
        """
        rows, columns = self.shape
        if self.phase == "packed":
            raise AttachError(
                f"{what} is given by columns, and this call packs several sequences into one row (continuous "
                "batching, padding-free training): use positions that do not depend on the batch's layout."
            )
        if values.ndim > 1 and values.shape[0] != self.batch_rows:
            raise InputError(
                f"{what} has {values.shape[0]} rows {list(values.shape)}, but the batch has {self.batch_rows}; "
                "expected the same number."
            )
        here = self.batch_columns
        now = slice(max(here.start, 0), max(here.stop, 0))
        found = values[now].expand(rows, -1) if values.ndim == 1 else values[:, now][self.owners.to(values.device)]
        found = found.to(self.index.device)
        if found.shape[1] == columns:
            return found
        before = min(max(-here.start, 0), columns)

        def filled(count: int) -> Tensor:
            return found.new_full((rows, count, *found.shape[2:]), fill)

        return torch.cat([filled(before), found, filled(columns - before - found.shape[1])], 1)

    def _position_mask(self, positions: Positions) -> Tensor | bool:
        if isinstance(positions, Tensor):
            return self.columns_of(positions, "The mask given as positions=", fill=False)
        if isinstance(positions, TokenIds):
            if self.ids is None:
                raise AttachError(f"positions={positions} needs token ids, and the model was called with embeddings.")
            return torch.isin(self.ids, self.ids.new_tensor(list(positions.ids)))
        if positions == "all":
            return True
        if self.phase == "packed" and (isinstance(positions, str) or lowest(positions) < 0):
            raise AttachError(
                f"positions={positions!r} depends on where each prompt ends, and this call packs several sequences "
                "into one row (continuous batching, padding-free training); use 'all' or positions from 0 on."
            )
        if isinstance(positions, str):
            return self._named(positions)
        return self._span(positions) if isinstance(positions, slice) else self._numbered(positions)

    def _named(self, positions: str) -> Tensor | bool:
        if positions == "last_prompt":
            return False if self.phase == "generated" else self.index == self.prompt_length - 1
        if self.phase != "mixed":
            return self.phase == positions
        in_prompt = self.index < self.prompt_length
        return in_prompt if positions == "prompt" else ~in_prompt

    def _span(self, positions: slice) -> Tensor:
        mask = self.index >= 0
        if positions.start is not None:
            mask = mask & (self.index >= self._bound(positions.start))
        return mask if positions.stop is None else mask & (self.index < self._bound(positions.stop))

    def _bound(self, bound: int) -> Tensor | int:
        return bound if bound >= 0 else self.prompt_length + bound

    def _numbered(self, positions: int | Sequence[int]) -> Tensor:
        if self.prompt_columns is not None and -lowest(positions) > self.prompt_columns and self.phase != "generated":
            raise InputError(
                f"positions={shorten(positions)} lies before the prompt's beginning: the longest row has at most "
                f"{self.prompt_columns} tokens."
            )
        wanted = self.index.new_tensor(_as_list(positions))
        from_start, from_end = wanted[wanted >= 0], wanted[wanted < 0]
        mask = torch.isin(self.index, from_start)
        if len(from_end):
            mask = mask | torch.isin(self.index - self.prompt_length, from_end)
        return mask & (self.index >= 0)


def _as_list(positions: int | Sequence[int]) -> Sequence[int]:
    return [positions] if isinstance(positions, int) else [int(position) for position in positions]


def lowest(positions: Positions) -> int:
    """Return the lowest position that is given as a number, 0 if there is none."""
    if isinstance(positions, slice):
        return min(positions.start or 0, positions.stop or 0)
    return 0 if isinstance(positions, (str, TokenIds, Tensor)) else min(_as_list(positions), default=0)


def unreached(positions: Positions, tokens: int, prompt: int) -> list[int]:
    """Return the positions at which there is no token.

    Args:
        positions: the positions of an intervention.
        tokens: number of tokens of the longest row.
        prompt: number of tokens of the longest prompt.
    """
    if isinstance(positions, slice):
        return [positions.start] if (positions.start or 0) >= max(tokens, 1) else []
    if isinstance(positions, (str, TokenIds, Tensor)):
        return []
    return [position for position in _as_list(positions) if position >= tokens or -position > prompt]


def shorten(value: object) -> str:
    """Return a value's representation for messages: one line of at most 80 characters."""
    return " ".join(repr(value).split())[:80]


def integers(values: object) -> tuple[int, ...] | None:
    """Return one whole number, or an iterable of them, as a tuple; None if a value is not a whole number."""
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        return None  # a mask, not indices
    try:
        several = tuple(values) if isinstance(values, Iterable) else (values,)
        return None if any(isinstance(each, bool) for each in several) else tuple(map(operator.index, several))
    except TypeError:
        return None


def check_positions(positions: Any) -> Positions:
    """Return positions in a form for `TokenContext.select`, as a copy if the caller could change them.

    Raises:
        InputError: with close matches for a mistyped name.
    """
    if isinstance(positions, str):
        if positions not in NAMED_POSITIONS:
            raise unknown_name("position selector", positions, NAMED_POSITIONS)
        return positions
    if isinstance(positions, TokenIds):
        return positions
    if isinstance(positions, slice):
        return _checked_span(positions)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.ndim not in (1, 2) or not positions.numel():
            raise InputError(f"positions is a mask {list(positions.shape)}; expected a bool tensor [S] or [B, S].")
        return positions.detach().clone()
    found = integers(positions)
    if found is None:
        raise InputError(
            f"positions is {shorten(positions)}; expected one of {', '.join(map(repr, NAMED_POSITIONS))}, {_KINDS}."
        )
    return found


def _checked_span(positions: slice) -> slice:
    """Return a span of positions with plain numbers.

    Raises:
        InputError: if its ends are not whole numbers, it has a step, or it is always empty.
    """
    found = integers([end for end in (positions.start, positions.stop) if end is not None])
    if found is None or positions.step not in (None, 1):
        raise InputError(f"positions is {shorten(positions)}; expected a slice of whole numbers, without a step.")
    start = None if positions.start is None else operator.index(positions.start)
    stop = None if positions.stop is None else operator.index(positions.stop)
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise InputError(f"positions is {positions}, which holds no token; expected an end after its beginning.")
    return slice(start, stop)


def check_rows(rows: Any) -> tuple[int, ...] | None:
    """Return rows as `TokenContext.select` understands them.

    Raises:
        InputError: if they are not numbers from 0 on.
    """
    if rows is None:
        return None
    found = integers(rows)
    if not found or min(found) < 0:
        raise InputError(f"rows is {shorten(rows)}; expected rows of the batch, such as 0 or [0, 2], or None for all.")
    return tuple(dict.fromkeys(found))
