"""What attached interventions did."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..interventions import Intervention, TokenContext

# What is remembered token by token; beyond it the oldest calls are counted, not listed, so that memory stays bounded.
CALLS_REMEMBERED = 4096
TOKENS_REMEMBERED = 1 << 20


@dataclass(frozen=True)
class InterventionReport:
    """What one intervention did.

    Attributes:
        verb: the intervention's class name.
        site: where.
        calls: how many times the site was reached.
        edited: number of tokens that were edited; without a KV cache a token counts each time it is computed.
        positions: per row of the calls, the edited positions in increasing order, -1 for padding; of the last
            4,096 calls or 2^20 tokens. With beams or several return sequences, each of them is a row.
    """

    verb: str
    site: str
    calls: int
    edited: int
    positions: Mapping[int, list[int]]


@dataclass(frozen=True)
class AttachReport:
    """What everything attached did, intervention by intervention."""

    interventions: list[InterventionReport]

    def __str__(self) -> str:
        """Return one line per intervention."""
        return "\n".join(
            f"{entry.verb} at {entry.site}: {entry.edited} tokens edited in {entry.calls} calls, "
            f"rows {sorted(entry.positions)}"
            for entry in self.interventions
        )


@dataclass
class Record:
    """Collects what one intervention does; nothing is read from the device before the report is asked for."""

    intervention: Intervention
    calls: int = 0
    forgotten: Tensor | int = 0
    masks: deque[tuple[Tensor, Tensor | bool]] = field(default_factory=deque)
    remembered: int = 0

    def add(self, tokens: TokenContext, mask: Tensor | bool) -> None:
        """Remember one call."""
        self.calls += 1
        if mask is not False:
            self.masks.append((tokens.index, mask))
            self.remembered += tokens.index.numel()
        while len(self.masks) > CALLS_REMEMBERED or (self.remembered > TOKENS_REMEMBERED and len(self.masks) > 1):
            index, old = self.masks.popleft()
            self.remembered -= index.numel()
            self.forgotten = self.forgotten + (old.sum() if isinstance(old, Tensor) else index.numel())

    def report(self) -> InterventionReport:
        """Return what was collected."""
        positions: dict[int, set[int]] = {}
        edited = int(self.forgotten)
        for index, mask in self.masks:
            chosen = mask if isinstance(mask, Tensor) else torch.ones_like(index, dtype=torch.bool)
            edited += int(chosen.sum())
            for row, column in chosen.nonzero().tolist():
                positions.setdefault(row, set()).add(int(index[row, column]))
        return InterventionReport(
            verb=type(self.intervention).__name__,
            site=str(self.intervention.place),
            calls=self.calls,
            edited=edited,
            positions={row: sorted(places) for row, places in sorted(positions.items())},
        )
