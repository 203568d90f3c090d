"""Streams of token batches with a position, and batches that a user provides; `packing` tokenises text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from ...errors import InputError
from ...hooks.harvest import TokenSource
from ...hooks.token_batches import TokenBatch
from .base import Cursor, State, require_rank


class TokenStream(ABC):
    """Batches of tokens that can be read repeatedly, from any position.

    Attributes:
        special_ids: tokens that are not text, such as separators of documents; their activations are left out.
    """

    special_ids: tuple[int, ...] = ()

    @abstractmethod
    def open(self, state: State | None = None) -> Cursor[TokenBatch]:
        """Return an iterator over one epoch.

        Args:
            state: from the `state_dict` of another such iterator, to continue from its position.
        """

    @abstractmethod
    def shard(self, rank: int, world_size: int) -> TokenStream:
        """Return the part that one of several processes reads.

        Args:
            rank: of the process.
            world_size: number of processes.
        """

    def facts(self) -> Mapping[str, Any]:
        """Return the properties that have to equal those of a saved position, besides the text; plain JSON."""
        return {}

    def require_fitting(self, model: Any) -> None:  # noqa: B027  # most have nothing to refuse
        """Raise if it is known in advance that a causal LM cannot read these tokens.

        Raises:
            InputError: with the reason.
        """

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yield all batches once."""
        return self.open()


class GivenTokens(TokenStream):
    """Batches of tokens that a user provides; with several processes, each takes every `world_size`-th batch.

    To continue from a position, the batches before it are read and dropped: their order must be the same again.

    Args:
        batches: token ids ``[B, S]``, or mappings with ``input_ids`` and ``attention_mask``; or a function that
            returns an iterable of them.
        rank: of the process.
        world_size: number of processes.

    Raises:
        InputError: if it is a single batch, or text.
    """

    def __init__(self, batches: TokenSource, rank: int = 0, world_size: int = 1) -> None:
        if isinstance(batches, (Mapping, str, bytes)):
            raise InputError(
                f"Given one {type(batches).__name__} as tokens; expected batches, such as a list of token ids [B, S], "
                "or TextTokens(text, tokenizer)."
            )
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def open(self, state: State | None = None) -> Cursor[TokenBatch]:
        """Return an iterator over the batches of this process."""
        return _Counted(self, 0 if state is None else state["batches"])

    def shard(self, rank: int, world_size: int) -> GivenTokens:
        """Return every `world_size`-th batch, beginning with index `rank`."""
        require_rank(rank, world_size)
        return GivenTokens(self.batches, self.rank + self.world_size * rank, self.world_size * world_size)


class _Counted(Cursor[TokenBatch]):
    """An iterator over batches that counts them.

    Args:
        tokens: to read.
        done: number of batches to skip.
    """

    def __init__(self, tokens: GivenTokens, done: int) -> None:
        self.done = done
        given: Any = tokens.batches() if callable(tokens.batches) else tokens.batches
        self._left = islice(iter(given), tokens.rank + done * tokens.world_size, None, tokens.world_size)

    def __next__(self) -> TokenBatch:
        """Return the next batch."""
        batch: TokenBatch = next(self._left)
        self.done += 1
        return batch

    def state_dict(self) -> State:
        """Return the number of batches read."""
        return {"batches": self.done}


def ids_of(batch: TokenBatch) -> Tensor:
    """Return the token ids ``[B, S]`` of a batch."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    assert isinstance(ids, Tensor)
    return ids


def rows_in(batch: TokenBatch) -> int:
    """Return the number of sequences of a batch of tokens."""
    return len(ids_of(batch))


def is_by_row(batch: TokenBatch) -> bool:
    """Whether a batch can be divided by sequences: whether all its values are tensors ``[B, ...]``."""
    if isinstance(batch, Tensor):
        return batch.ndim > 1
    rows = rows_in(batch)
    return all(isinstance(each, Tensor) and each.ndim > 1 and len(each) == rows for each in batch.values())


def rows_of(batch: TokenBatch, rows: slice) -> TokenBatch:
    """Return some sequences of a batch for which `is_by_row` is True."""
    return batch[rows] if isinstance(batch, Tensor) else {name: each[rows] for name, each in batch.items()}
