"""Holding some text back, so that SAEs can be measured on what they have not learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ...hooks.token_batches import TokenBatch
from .base import Cursor, State
from .tokens import TokenStream, rows_in, rows_of

ENOUGH = 10
"""A text has to have so many times the sequences that are held back from it."""


class HeldBack(TokenStream):
    """Tokens of which the first sequences are not read, or beside which stands other text.

    Of several processes each holds back the first sequences of the part that it reads itself.

    Args:
        tokens: what is read.
        sequences: how many to hold back.
        other: other text that takes their place; then `tokens` are read whole.

    Attributes:
        tokens: what is read, the sequences that are held back among it.
        sequences: how many are held back, or of the other text measured.
    """

    def __init__(self, tokens: TokenStream, sequences: int, other: TokenStream | None = None) -> None:
        self.tokens, self.sequences, self.other = tokens, sequences, other
        self.special_ids = tokens.special_ids

    @property
    def skipped(self) -> int:
        """How many sequences at the beginning are not read."""
        return 0 if self.other is not None else self.sequences

    def facts(self) -> Mapping[str, Any]:
        """Return what a saved position and these tokens have to agree in."""
        return {**self.tokens.facts(), **({"held_back": self.skipped} if self.skipped else {})}

    def require_fitting(self, model: Any) -> None:
        """Raise if the model cannot read the tokens; errors as for those."""
        self.tokens.require_fitting(model)

    def held_out(self) -> Iterator[TokenBatch]:
        """Yield what is held back, in batches."""
        missing = self.sequences
        for batch in self.tokens if self.other is None else self.other:
            rows = rows_in(batch)
            yield rows_of(batch, slice(missing)) if missing < rows else batch
            missing -= rows
            if missing <= 0:
                return

    def open(self, state: State | None = None) -> Cursor[TokenBatch]:
        """Return an iterator over the rest."""
        if state is None:
            return _Rest(self.tokens.open(), self.skipped)
        return _Rest(self.tokens.open(state["tokens"]), state["skip"])

    def shard(self, rank: int, world_size: int) -> HeldBack:
        """Return the part that one of several processes reads; other text is measured by all of them."""
        return HeldBack(self.tokens.shard(rank, world_size), self.sequences, self.other)


class _Rest(Cursor[TokenBatch]):
    """An iterator that leaves out the first sequences.

    Args:
        batches: all of them.
        skip: how many sequences to leave out.
    """

    def __init__(self, batches: Cursor[TokenBatch], skip: int) -> None:
        self.batches, self.skip = batches, skip

    def __next__(self) -> TokenBatch:
        """Return the next batch."""
        while True:
            batch = next(self.batches)
            rows = rows_in(batch)
            if not self.skip:
                return batch
            if self.skip < rows:
                rest = rows_of(batch, slice(self.skip, None))
                self.skip = 0
                return rest
            self.skip -= rows

    def state_dict(self) -> State:
        """Return the position, and how many sequences are still to be left out."""
        return {"tokens": self.batches.state_dict(), "skip": self.skip}


def can_hold_back(tokens: TokenStream, sequences: int) -> bool:
    """Whether a text is long enough to hold sequences back from it."""
    wanted = ENOUGH * sequences
    for batch in islice(tokens, wanted):
        wanted -= rows_in(batch)
        if wanted <= 0:
            return True
    return False
