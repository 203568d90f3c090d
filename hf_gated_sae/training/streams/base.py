"""What every stream of activations can do, and how its position is kept."""

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
"""A position: numbers, strings, lists and tensors in nested dictionaries with names for keys."""

ANY_SITE = ""
"""The name under which activations stand that do not say where they are from."""


class Cursor(ABC, Generic[Item]):
    """An iterator that can say where it is, so that another one can go on from there."""

    def __iter__(self) -> Iterator[Item]:
        """Return itself."""
        return self

    @abstractmethod
    def __next__(self) -> Item:
        """Return the next item."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return the position after the last item that was given."""


class ActivationStream(ABC):
    """Activations of one or several sites, without end: what is exhausted starts again.

    Rows are aligned: in every batch, row `i` of all sites belongs to the same token, so that a transcoder's input and
    output are two sites of one stream.

    Attributes:
        sites: where the activations are from; `""` for activations that fit any SAE.
        special_ids: the tokens whose activations are left out; empty if none are, None if that is not known.
        failure: why this process could not go on reading, where it has to tell others; its batches are NaN from then.
        report: called while activations are read that are not served at once.
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
            state: from the `state_dict` of another such iterator, to go on from there.
        """

    @abstractmethod
    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield about `count` activations in pieces, at most all there are, for statistics.

        The position of `batches` stays as it is.

        Yields:
            Site -> ``[n, d]``.
        """

    @abstractmethod
    def shard(self, rank: int, world_size: int) -> ActivationStream:
        """Return the part of the activations that one of several processes reads, from its beginning.

        Args:
            rank: number of the process.
            world_size: how many there are.
        """

    def size_for(self, activations: int, batch_size: int) -> None:  # noqa: B027  # most have nothing to choose
        """Choose the sizes that were left open, in proportion to a run.

        Args:
            activations: how many it learns from, in this process.
            batch_size: activations per batch.
        """

    def size_as(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over the sizes that were left open from the state of the stream of a run that is resumed."""

    @property
    def buffer_bytes(self) -> int:
        """What it holds of activations beside those of a batch, for shuffling; 0 if it reads them where they are."""
        return 0

    def facts(self) -> Mapping[str, Any]:
        """Return what a saved position and this stream have to agree in, besides class and sites."""
        return {}

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Give shuffled batches for ever, from the beginning; the same ones at every call.

        Only the first call after `load_state_dict` goes on from the position that was loaded.

        Args:
            batch_size: activations per batch.

        Returns:
            An iterator over batches, site -> ``[batch_size, d]``.

        Raises:
            InputError: if `batch_size` is less than 1, or more than the stream can serve.
            CheckpointError: if the position that was loaded is not whole.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1.")
        try:
            self._cursor = self.open(batch_size, self._resumed)
        except SAEError:
            raise
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"The position of the {type(self).__name__} that was loaded is not whole ({error!r}): resume from an "
                "earlier checkpoint."
            ) from error
        self._resumed = None  # it may hold as much as the buffer
        return self._cursor

    def state_dict(self) -> State:
        """Return the position after the last batch that the latest `batches` gave.

        Returns:
            Numbers, strings, lists and tensors on the CPU in nested dictionaries; they fit into JSON and safetensors.
        """
        position = self._resumed if self._cursor is None else self._cursor.state_dict()
        return {**self._identity(), "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position: the next `batches` gives what would have come after it, bit by bit.

        Args:
            state: from `state_dict` of a stream that was made like this one.

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
        """Forget a position that was loaded: the next `batches` begins at the beginning."""
        self._resumed = self._cursor = None

    def key(self, site: str | None) -> str:
        """Return under which name the activations for an SAE stand in a batch.

        Args:
            site: the site that its configuration names; None if it names none.

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
    """Raise unless there is such a process.

    Raises:
        InputError: with both numbers.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size.")
