"""A pool of activations of stated size that mixes the tokens of many documents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class ShuffleBuffer:
    """Holds up to `size` activation vectors and serves them in random order.

    Neighbouring tokens are alike, so consecutive batches of an unshuffled stream would all pull the same way. Slots
    are reused in place: the pool never grows, and nothing is copied but what enters and what leaves.

    Args:
        size: number of vectors held, at least one batch.
        generator: source of randomness, on the CPU.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), footnote 13.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator
        self.count = 0
        self._pool: Tensor | None = None
        self._slots = torch.arange(size)  # the first `count` of them are taken

    @property
    def is_full(self) -> bool:
        """Whether nothing more fits."""
        return self.count == self.size

    def add(self, vectors: Tensor) -> Tensor:
        """Take in as many vectors as fit.

        Args:
            vectors: ``[n, d]``.

        Returns:
            The rest, ``[m, d]``.
        """
        if self._pool is None:
            self._pool = vectors.new_empty(self.size, vectors.shape[-1])
        taken = min(len(vectors), self.size - self.count)
        self._pool[self._slots[self.count : self.count + taken]] = vectors[:taken]
        self.count += taken
        return vectors[taken:]

    def serve(self, batch_size: int, keep: int = 0) -> Iterator[Tensor]:
        """Yield whole random batches until at most `keep` vectors, or less than one batch beyond them, are left.

        Args:
            batch_size: vectors per batch.
            keep: how many to leave behind, to be mixed with what comes next.

        Yields:
            Batches ``[batch_size, d]``.
        """
        if self._pool is None:
            return
        order = torch.randperm(self.count, generator=self.generator)
        self._slots[: self.count] = self._slots[: self.count][order]
        while self.count - batch_size >= keep:
            self.count -= batch_size
            yield self._pool[self._slots[self.count : self.count + batch_size]]
