"""Activations that several processes read in parts and exchange."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, SAEError
from ..processes import Processes
from ..streams import ActivationStream
from ..streams.base import Cursor, State


class GatheredActivations(ActivationStream):
    """One process's part of the activations, joined with the parts of processes that share samples or batches.

    Samples, from which statistics are computed, are the same in all processes. Batches are the same in the processes
    that hold parts of one SAE: each reads ``batch_size / count`` activations with its own base model, and receives
    those of the others.

    Args:
        own: this process's part; see `ActivationStream.shard`.
        samples: the processes that share samples.
        batches: the processes that share batches as well.
    """

    def __init__(self, own: ActivationStream, samples: Processes, batches: Processes) -> None:
        self.own = own
        self.sharing_samples = samples
        self.sharing_batches = batches
        self.sites = own.sites

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer of this process's own part."""
        return self.own.buffer_bytes

    def size_for(self, activations: int, batch_size: int) -> None:
        """Choose the sizes of this process's own part, which provides its share of every batch."""
        count = self.sharing_batches.count
        self.own.size_for(activations // count, -(-batch_size // count))

    def size_as(self, state: Mapping[str, Any]) -> None:
        """Set the sizes of this process's own part to those of a saved state."""
        self.own.size_as(state)

    def facts(self) -> dict[str, Any]:
        """Return the properties that have to be the same when a run is resumed."""
        return {**self.own.facts(), "of": type(self.own).__name__, "shared_by": self.sharing_batches.count}

    def open(self, batch_size: int, state: State | None) -> Cursor[dict[str, Tensor]]:
        """Return an endless iterator over batches.

        Raises:
            InputError: if a batch cannot be divided equally between the processes.
        """
        count = self.sharing_batches.count
        if batch_size % count:
            raise InputError(
                f"Batches of {batch_size} activations cannot be divided equally between the {count} processes that "
                f"share them; choose a multiple of {count}."
            )
        error, cursor = None, None
        try:
            cursor = self.own.open(batch_size // count, state)
        except SAEError as found:
            error = found
        self.failure = None
        self.sharing_samples.raise_first(error)
        assert cursor is not None
        return _Gathered(cursor, self)

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield about `count` activations; each process contributes an equal share of its own sample."""
        sharing, pieces = self.sharing_samples, self.own.sample(count)
        left: dict[str, Tensor] = {}
        ended, error = False, None
        while True:
            rows = min((len(x) // sharing.count for x in left.values()), default=0)
            if not rows and not ended:
                try:
                    piece = next(pieces, None)
                except SAEError as found:
                    piece, error = None, found
                ended = piece is None
                left = {site: torch.cat([left[site], x]) if left else x for site, x in (piece or left).items()}
                rows = min((len(x) // sharing.count for x in left.values()), default=0)
            # One number: -1 failed, 0 at the end, 1 fewer rows than processes so far, else 1 + rows for each process.
            status = sharing.smallest(-1 if error else rows + 1 if rows else 0 if ended else 1)
            if status < 0:
                sharing.raise_first(error)
            if status < 1:
                return
            rows = status - 1
            if rows:
                yield {
                    site: sharing.gather_rows(x[sharing.rank : rows * sharing.count : sharing.count])
                    for site, x in left.items()
                }
                left = {site: x[rows * sharing.count :] for site, x in left.items()}

    def shard(self, rank: int, world_size: int) -> ActivationStream:
        """Return the stream with this process's part divided once more, into `world_size` parts."""
        part = copy.copy(self)
        part.own = self.own.shard(rank, world_size)
        part._resumed = part._cursor = None
        return part


class _Gathered(Cursor[dict[str, Tensor]]):
    """Batches with the rows of this process and of the others.

    A process that cannot read further contributes NaN rows until all processes stop together at the next check: the
    others wait for its part of each batch, and of the gradients.
    """

    def __init__(self, own: Cursor[dict[str, Tensor]], stream: GatheredActivations) -> None:
        self.own = own
        self.stream = stream
        self._latest: dict[str, Tensor] = {}

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch.

        Raises:
            SAEError: in all processes, if one of them cannot provide its part of the first batch.
        """
        stream, is_first = self.stream, not self._latest
        if stream.failure is None:
            try:
                self._latest = next(self.own)
            except SAEError as error:
                stream.failure = error
                self._latest = {site: torch.full_like(x, torch.nan) for site, x in self._latest.items()}
        if is_first:
            stream.sharing_samples.raise_first(stream.failure)
        return {site: stream.sharing_batches.gather_rows(self._latest[site]) for site in stream.sites}

    def state_dict(self) -> State:
        """Return the position of this process's own part."""
        return self.own.state_dict()
