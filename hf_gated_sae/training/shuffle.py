"""A shuffle buffer for activations, which mixes the tokens of many documents.

The buffer of `datasets.IterableDataset.shuffle` holds Python rows and is empty again after a resume, as the
documentation of its `state_dict` says. This one holds tensors on the model's device and is stored in checkpoints, so
that a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .take_rows import take_rows

COPIED_AT_ONCE = 1 << 16


class ShuffleBuffer:
    """Holds up to `size` rows, the activations of one or several sites at a token, and returns them in random order.

    Neighbouring tokens are correlated, so gradients of consecutive batches of an unshuffled stream would be too. Slots
    are reused in place: the pool never grows, and only rows that are added or taken are copied. It takes
    ``size * sum(d) * bytes per number``, on the device of the rows.

    Args:
        size: maximum number of rows, at least one batch.
        generator: source of randomness, on the CPU.

    Attributes:
        count: number of rows held now.

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), footnote 13.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.generator = generator
        self.count = 0
        self._pools: dict[str, Tensor] = {}
        self._slots = torch.arange(size)  # the first `count` of them are taken

    @property
    def is_full(self) -> bool:
        """Whether it holds `size` rows."""
        return self.count == self.size

    def add(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the rows that fit.

        Args:
            rows: site -> ``[n, d]``, the same number and sites each time.

        Returns:
            The remaining rows, site -> ``[m, d]``.
        """
        taken = min(len(next(iter(rows.values()))), self.size - self.count)
        slots = self._slots[self.count : self.count + taken]
        for site, x in rows.items():
            if site not in self._pools:
                self._pools[site] = x.new_empty(self.size, x.shape[-1])
            elif self._pools[site].device != x.device:  # loaded from a checkpoint, to the CPU
                self._pools[site] = self._pools[site].to(x.device)
            self._pools[site][slots.to(x.device)] = x[:taken]
        self.count += taken
        return {site: x[taken:] for site, x in rows.items()}

    def mix(self) -> None:
        """Permute the rows at random."""
        order = torch.randperm(self.count, generator=self.generator)
        self._slots[: self.count] = self._slots[: self.count][order]

    def take(self, batch_size: int) -> dict[str, Tensor]:
        """Remove and return the next rows, in the order of the latest `mix`; site -> ``[batch_size, d]``."""
        self.count -= batch_size
        return self._rows(self._slots[self.count : self.count + batch_size])

    def serve(self, batch_size: int, keep: int = 0) -> Iterator[dict[str, Tensor]]:
        """Mix, and yield whole batches until less than one batch beyond `keep` rows is left.

        Args:
            batch_size: rows per batch.
            keep: number of rows to keep, to be mixed with those added next.

        Yields:
            Batches, site -> ``[batch_size, d]``.
        """
        self.mix()
        while self.count - batch_size >= keep:
            yield self.take(batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the rows on the CPU, in their current order; `take` returns them from the end."""
        held: dict[str, Tensor] = {}
        for site, pool in self._pools.items():
            held[site] = torch.empty(self.count, pool.shape[-1], dtype=pool.dtype)
            for start in range(0, self.count, COPIED_AT_ONCE):  # in pieces, so that a GPU does not hold it twice
                stop = min(self.count, start + COPIED_AT_ONCE)
                held[site][start:stop] = pool[self._slots[start:stop].to(pool.device)].cpu()
        return held

    def load_state_dict(self, held: Mapping[str, Tensor]) -> None:
        """Replace the rows by those of a saved state; the generator does not change."""
        self.count, self._pools, self._slots = 0, {}, torch.arange(self.size)
        if held:
            self.add(held)

    def _rows(self, slots: Tensor) -> dict[str, Tensor]:
        return {site: take_rows(pool, slots) for site, pool in self._pools.items()}
