"""Activations that several processes read in parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...errors import InputError
from ..processes import Processes
from ..streams import ActivationStream
from ..streams.base import Cursor, State


class GatheredActivations(ActivationStream):
    """One process's part of the activations, with what others read where all have to see the same.

    Samples, from which statistics are made, are the same in all processes. Batches are so where processes hold parts
    of one SAE: each reads ``batch_size / count`` activations with its own base model, and gets those of the others.

    Args:
        own: this process's part; see `ActivationStream.shard`.
        samples: the processes that share samples.
        batches: the processes that share batches, too.
    """

    def __init__(self, own: ActivationStream, samples: Processes, batches: Processes) -> None:
        self.own = own
        self.sharing_samples = samples
        self.sharing_batches = batches
        self.sites = own.sites

    @property
    def buffer_bytes(self) -> int:
        """What this process's own part holds."""
        return self.own.buffer_bytes

    def facts(self) -> dict[str, Any]:
        """Return what is to be the same when a run goes on."""
        return {**self.own.facts(), "of": type(self.own).__name__, "shared_by": self.sharing_batches.count}

    def open(self, batch_size: int, state: State | None) -> Cursor[dict[str, Tensor]]:
        """Return an endless iterator over batches.

        Raises:
            InputError: if the processes cannot give equal parts of a batch.
        """
        count = self.sharing_batches.count
        if batch_size % count:
            raise InputError(
                f"Batches of {batch_size} activations cannot come in equal parts from the {count} processes that "
                "share them; choose a multiple."
            )
        return _Gathered(self.own.open(batch_size // count, state), self.sharing_batches)

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield about `count` activations, every process's share of what it would have sampled alone."""
        sharing, pieces = self.sharing_samples, self.own.sample(count)
        while True:
            piece = next(pieces, {})
            rows = min((len(x) // sharing.count for x in piece.values()), default=0)
            rows = sharing.smallest(rows)
            if not rows:  # one of them has no more
                return
            yield {site: sharing.rows(x[sharing.rank :: sharing.count][:rows]) for site, x in piece.items()}

    def shard(self, rank: int, world_size: int) -> ActivationStream:
        """Return the stream of which every process reads one of `world_size` parts of what it reads now."""
        part = copy.copy(self)
        part.own = self.own.shard(rank, world_size)
        part._resumed = part._cursor = None
        return part


class _Gathered(Cursor[dict[str, Tensor]]):
    """Batches of one process, with the rows of others."""

    def __init__(self, own: Cursor[dict[str, Tensor]], sharing: Processes) -> None:
        self.own = own
        self.sharing = sharing

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch."""
        return {site: self.sharing.rows(x) for site, x in next(self.own).items()}

    def state_dict(self) -> State:
        """Return where this process's own part is."""
        return self.own.state_dict()
