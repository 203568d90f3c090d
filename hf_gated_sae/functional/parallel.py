"""Interfaces to other processes that hold the rest of an SAE's latents, or of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .sparse_latents import SparseLatents
from .support import Support


class LatentParallelGroup(ABC):
    """The processes that hold the other latents of an SAE; all of them see the same tokens."""

    @abstractmethod
    def summed(self, part: Tensor) -> Tensor:
        """Return the sum over all processes; its gradient goes to every part unchanged."""

    @abstractmethod
    def alike(self, value: Tensor) -> Tensor:
        """Return a value that is the same in all processes; its gradient is summed over them."""


class DataParallelGroup(ABC):
    """The processes that hold the other tokens of a batch, and the same SAE; each has as many tokens."""

    @abstractmethod
    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the processes, any shape, without a gradient."""

    @abstractmethod
    def lowest_of_largest(self, values: Tensor, count: int) -> Tensor:
        """Return the smallest of the largest positive values of all processes, ``[]``; 0 if there are none.

        Args:
            values: of this process, any shape.
            count: number of largest values to select, per process.
        """


class LatentParallelSupport(Support):
    """The support of an objective in a process that holds some of the latents; sums over latents are over all.

    Args:
        own: the support of the process's own latents.
        others: the processes that hold the rest.
    """

    def __init__(self, own: Support, others: LatentParallelGroup) -> None:
        self._own, self._others = own, others
        self.projection, self.latents = own.projection, own.latents

    def project(self, W_enc_T: Tensor) -> Tensor:
        """Return the projections of the process's own latents through another encoder."""
        return self._own.project(W_enc_T)

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return what the values of all processes write, ``[..., d_out]``."""
        return self._others.summed(self._own.decode(values, W_dec))

    def decode_each(self, values: Sequence[Tensor], W_dec: Tensor, frozen: Sequence[bool]) -> Sequence[Tensor]:
        """Decode several values of all processes; see `Support.decode_each`."""
        return [self._others.summed(each) for each in self._own.decode_each(values, W_dec, frozen)]

    def mean_sum(self, values: Tensor) -> Tensor:
        """Return the mean over tokens of the sum over the latents of all processes, ``[]``."""
        return self._others.summed(self._own.mean_sum(values))

    def code(self, values: Tensor) -> Tensor | SparseLatents:
        """Return values as the process's own latents, without a gradient."""
        return self._own.code(values)
