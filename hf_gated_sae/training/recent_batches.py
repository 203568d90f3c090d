"""The latest training batches, stored for use some steps later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class RecentBatches:
    """The latest training batches in order; a tensor that is both input and target is stored once."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield input ``[n, d_in]`` and target ``[n, d_out]`` of each."""
        return iter(self._pairs)

    def observe(self, x: Tensor, target: Tensor) -> None:
        """Store a batch.

        Args:
            x: activations ``[n, d_in]``.
            target: ``[n, d_out]``; `x` itself unless the SAE is a transcoder.
        """
        held = x.detach()
        self._pairs.append((held, held if target is x else target.detach()))

    def clear(self) -> None:
        """Remove all batches."""
        self._pairs.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the batches: input and target of each, or the one tensor that is both."""
        return {"recent": [[x] if target is x else [x, target] for x, target in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace the batches by those of a saved state, on a device."""
        held = [[tensor.to(device) for tensor in tensors] for tensors in state["recent"]]
        self._pairs = [(tensors[0], tensors[-1]) for tensors in held]
