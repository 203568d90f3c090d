"""Activations with random access, read in a new random permutation every epoch."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .base import ActivationStream, Cursor, State, require_rank

SAMPLED_AT_ONCE = 4096


class RowActivations(ActivationStream):
    """Activations whose rows have an index; every epoch is a new permutation of all of them.

    An incomplete last batch of an epoch is dropped. Several processes split every batch between them: batch `i` of all
    their shards together is batch `i` of one process with a `world_size` times larger batch.

    Args:
        seed: of the permutations.
    """

    rank, world_size = 0, 1

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Return some rows, site -> ``[n, d]``.

        Args:
            rows: their indices ``[n]`` int64, in the order of the result.
        """

    def facts(self) -> dict[str, Any]:
        """Return the number of rows, on which the permutations depend."""
        return {"rows": len(self)}

    def open(self, batch_size: int, state: State | None) -> Cursor[dict[str, Tensor]]:
        """Return an endless iterator over random batches.

        Raises:
            InputError: if there are fewer rows than a batch has.
        """
        whole = batch_size * self.world_size
        if len(self) < whole:
            of_all = f" ({whole} in {self.world_size} processes)" if self.world_size > 1 else ""
            raise InputError(
                f"There are {len(self)} activations, less than one batch of {batch_size}{of_all}: give more of them, "
                "or a smaller batch size."
            )
        return _Permutations(self, batch_size, state)

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield `count` activations drawn at random, the same ones in every process."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed))[:count]
        for some in rows.split(SAMPLED_AT_ONCE):
            yield self.rows(some)

    def shard(self, rank: int, world_size: int) -> RowActivations:
        """Return the stream that gives rows ``rank::world_size`` of every batch of all processes together."""
        require_rank(rank, world_size)
        part = copy.copy(self)
        part.rank, part.world_size = self.rank + self.world_size * rank, self.world_size * world_size
        part._resumed = part._cursor = None
        return part


class _Permutations(Cursor[dict[str, Tensor]]):
    """Batches of successive permutations.

    Args:
        stream: whose rows are permuted.
        batch_size: rows per batch of this process.
        state: saved position to continue from.
    """

    def __init__(self, stream: RowActivations, batch_size: int, state: State | None) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(stream.seed)
        self.epoch = self.served = 0
        if state is not None:
            self.epoch, self.served = state["epoch"], state["served"]
            self.generator.set_state(state["generator"])
        self._begin()

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch of this process."""
        whole = self.batch_size * self.stream.world_size
        if self.served + whole > len(self.order):
            self.epoch, self.served = self.epoch + 1, 0
            self._begin()
        rows = self.order[self.served : self.served + whole][self.stream.rank :: self.stream.world_size].contiguous()
        self.served += whole
        return self.stream.rows(rows)

    def _begin(self) -> None:
        self._before = self.generator.get_state()  # reproduces the permutation of this epoch
        self.order = torch.randperm(len(self.stream), generator=self.generator)

    def state_dict(self) -> State:
        """Return the epoch, the number of its rows served in all processes, and its permutation's random state."""
        return {"epoch": self.epoch, "served": self.served, "generator": self._before.clone()}
