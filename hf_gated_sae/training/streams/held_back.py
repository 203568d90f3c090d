"""Holding some text back from training, so that SAEs can be evaluated on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ...hooks.token_batches import TokenBatch
from .base import Cursor, State
from .tokens import TokenStream, rows_in, rows_of

ENOUGH = 10
"""Smallest ratio of a text's sequences to those that are held back from it."""


class HeldBack(TokenStream):
    """Tokens with held-out sequences: their own first ones, which are not trained on, or those of other text.

    With several processes, each holds back the first sequences of its own part.

    Args:
        tokens: of the training text.
        sequences: number of sequences to hold back.
        other: other held-out text; if given, all of `tokens` are trained on.

    Attributes:
        tokens: of the training text, including the sequences that are held back.
        sequences: number of sequences that are held back, or evaluated of the other text.
    """

    def __init__(self, tokens: TokenStream, sequences: int, other: TokenStream | None = None) -> None:
        self.tokens, self.sequences, self.other = tokens, sequences, other
        self.special_ids = tokens.special_ids

    @property
    def skipped(self) -> int:
        """Number of sequences at the beginning that are not trained on."""
        return 0 if self.other is not None else self.sequences

    def facts(self) -> Mapping[str, Any]:
        """Return the properties that have to equal those of a saved position."""
        return {**self.tokens.facts(), **({"held_back": self.skipped} if self.skipped else {})}

    def require_fitting(self, model: Any) -> None:
        """Raise if the model cannot read the tokens; errors as for `TokenStream.require_fitting`."""
        self.tokens.require_fitting(model)

    def held_out(self) -> Iterator[TokenBatch]:
        """Yield the held-out sequences, in batches."""
        missing = self.sequences
        for batch in self.tokens if self.other is None else self.other:
            rows = rows_in(batch)
            yield rows_of(batch, slice(missing)) if missing < rows else batch
            missing -= rows
            if missing <= 0:
                return

    def open(self, state: State | None = None) -> Cursor[TokenBatch]:
        """Return an iterator over the sequences that are trained on."""
        if state is None:
            return _SkipFirst(self.tokens.open(), self.skipped)
        return _SkipFirst(self.tokens.open(state["tokens"]), state["skip"])

    def shard(self, rank: int, world_size: int) -> HeldBack:
        """Return the part that one of several processes reads; other held-out text is read by all of them."""
        return HeldBack(self.tokens.shard(rank, world_size), self.sequences, self.other)


class _SkipFirst(Cursor[TokenBatch]):
    """An iterator over batches that skips the first sequences.

    Args:
        batches: all batches.
        skip: number of sequences to skip.
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
        """Return the position, and the number of sequences that are still to be skipped."""
        return {"tokens": self.batches.state_dict(), "skip": self.skip}


def can_hold_back(tokens: TokenStream, sequences: int) -> bool:
    """Whether a text is long enough to hold back `sequences` sequences."""
    wanted = ENOUGH * sequences
    for batch in islice(tokens, wanted):
        wanted -= rows_in(batch)
        if wanted <= 0:
            return True
    return False
