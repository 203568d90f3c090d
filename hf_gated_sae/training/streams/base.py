"""Base classes of activation streams and of iterators with a position that can be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from ...errors import CheckpointError, InputError, SAEError, unknown_name
from ...sites import Site
from ..phases import Report

Item = TypeVar("Item")
State = dict[str, Any]
"""A position: numbers, strings, lists and tensors in nested dictionaries with string keys."""

ANY_SITE = ""
"""The key of activations without a site."""


class Cursor(ABC, Generic[Item]):
    """An iterator whose position can be saved, so that another one continues from it."""

    def __iter__(self) -> Iterator[Item]:
        """Return itself."""
        return self

    @abstractmethod
    def __next__(self) -> Item:
        """Return the next item."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return the position after the last item returned."""


class ActivationStream(ABC):
    """An endless stream of activations at one or several sites; an exhausted source starts again.

    Rows are aligned: in every batch, row `i` of all sites belongs to the same token, so that a transcoder's input and
    output are two sites of one stream.

    Attributes:
        sites: of the activations; `""` for activations that fit any SAE.
        special_ids: the tokens whose activations are left out; empty if none are, None if that is not known.
        failure: why this process could not read further, if others share its batches; they are NaN from then on.
        report: called with the progress while activations are read into a buffer or sample.
    """

    sites: tuple[str, ...]
    special_ids: tuple[int, ...] | None = None
    failure: SAEError | None = None
    report: Report | None = None
    _resumed: State | None = None
    _cursor: Cursor[dict[str, Tensor]] | None = None

    @abstractmethod
    def open(self, batch_size: int, state: State | None) -> Cursor[dict[str, Tensor]]:
        """Return an endless iterator over batches; `batches` calls it.

        Args:
            batch_size: activations per batch.
            state: from the `state_dict` of another such iterator, to continue from its position.
        """

    @abstractmethod
    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield about `count` activations in pieces, for statistics; all of them if there are fewer.

        The position of `batches` does not change.

        Yields:
            Site -> ``[n, d]``.
        """

    @abstractmethod
    def shard(self, rank: int, world_size: int) -> ActivationStream:
        """Return the part of the activations that one of several processes reads, from its beginning.

        Args:
            rank: of the process.
            world_size: number of processes.
        """

    def size_for(self, activations: int, batch_size: int) -> None:  # noqa: B027  # most have nothing to choose
        """Choose the sizes that were not given, in proportion to a run.

        Args:
            activations: number that the run trains on, in this process.
            batch_size: activations per batch.
        """

    def size_as(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Set the sizes that were not given to those of a saved state, when a run is resumed."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the activations held for shuffling; 0 without a shuffle buffer."""
        return 0

    def facts(self) -> Mapping[str, Any]:
        """Return the properties that have to equal those of a saved position, besides class and sites."""
        return {}

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Return an endless iterator over shuffled batches, from the beginning; the same ones at every call.

        Only the first call after `load_state_dict` continues from the loaded position.

        Args:
            batch_size: activations per batch.

        Returns:
            An iterator over batches, site -> ``[batch_size, d]``.

        Raises:
            InputError: if `batch_size` is less than 1, or more than the stream can serve.
            CheckpointError: if the loaded position is incomplete.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1.")
        try:
            self._cursor = self.open(batch_size, self._resumed)
        except SAEError:
            raise
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"The loaded position of the {type(self).__name__} is incomplete ({error!r}): resume from an earlier "
                "checkpoint."
            ) from error
        self._resumed = None  # it may be as large as the buffer
        return self._cursor

    def state_dict(self) -> State:
        """Return the position after the last batch of the latest `batches` iterator.

        Returns:
            Numbers, strings, lists and tensors on the CPU in nested dictionaries, for JSON and safetensors files.
        """
        position = self._resumed if self._cursor is None else self._cursor.state_dict()
        return {**self._identity(), "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position: the next `batches` continues after it, bit for bit.

        Args:
            state: from `state_dict` of a stream with the same settings.

        Raises:
            CheckpointError: if it is the position of another stream.
        """
        self.size_as(state)
        for name, mine in self._identity().items():
            if name not in state or state[name] != mine:
                raise CheckpointError(
                    f"The saved position is of a stream with {name} {state.get(name)!r}; this one has {mine!r}. "
                    "Resume with the activations that the run was started with."
                )
        if "position" not in state:
            raise CheckpointError("The saved state of the stream has no position: resume from an earlier checkpoint.")
        self._resumed, self._cursor = state["position"], None

    def rewind(self) -> None:
        """Discard a loaded position: the next `batches` starts at the beginning."""
        self._resumed = self._cursor = None

    def key(self, site: str | None) -> str:
        """Return the key of an SAE's activations in a batch.

        Args:
            site: of the SAE's configuration; None if it has none.

        Raises:
            UnknownNameError: if the stream has no such site, or several and `site` is None.
        """
        if self.sites == (ANY_SITE,) or (site is None and len(self.sites) == 1):
            return self.sites[0]
        for mine in self.sites:
            if site is not None and str(Site.parse(mine)) == str(Site.parse(site)):
                return mine
        raise unknown_name("site of the stream", site, self.sites)

    def _identity(self) -> dict[str, Any]:
        return {"stream": type(self).__name__, "sites": list(self.sites), **self.facts()}


def require_rank(rank: int, world_size: int) -> None:
    """Raise unless ``0 <= rank < world_size``.

    Raises:
        InputError: with both numbers.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size.")
