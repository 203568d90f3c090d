"""How many tokens a run pushes through its model: counted on the text itself, without a forward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...evaluation.fidelity import FORWARDS
from ...hooks.token_batches import TokenBatch
from ..arguments import SAETrainingArguments
from ..phases import Phase
from ..streams import HeldBack, ModelActivations
from ..streams.tokens import ids_of

MOST_SECONDS = 20.0
"""After so long the rest of a run is taken to be like what was counted."""
TRAIN = "training"
"""The name of what is read between the steps, beside the phases."""


@dataclass(frozen=True)
class TokensRead:
    """Tokens that pass the model in a run, in one process, padding and special tokens included.

    Attributes:
        by_phase: tokens by phase, and by `TRAIN` those that are read between the steps.
        exact: whether all of them were counted; else the later steps are taken to be like the earlier.
    """

    by_phase: Mapping[str, int]
    exact: bool

    @property
    def total(self) -> int:
        """Tokens in all."""
        return sum(self.by_phase.values())

    @property
    def learned_from(self) -> int:
        """Tokens that were read to be learned."""
        return self.by_phase[Phase.FILL] + self.by_phase[TRAIN]


def count_tokens(stream: ModelActivations, args: SAETrainingArguments, measured: int) -> TokensRead:
    """Count the tokens of a run that reads its text with a model.

    Args:
        stream: where the activations come from, with all sizes chosen.
        args: the recipe.
        measured: how many SAEs are measured on held-out text.
    """
    counting = _Counting(stream)

    def sampled(count: int | None) -> int:
        before = counting.tokens_read
        for _ in counting.sample(count) if count else ():
            pass
        return counting.tokens_read - before

    scale, record = sampled(args.statistics_activations), sampled(args.recorded_activations)
    held_out = 0
    if isinstance(stream.tokens, HeldBack) and measured:
        tokens = sum(ids_of(batch).numel() for batch in stream.tokens.held_out())
        held_out = FORWARDS * tokens * measured * len(args.evaluation_steps)
    counting.tokens_read = 0
    counting.rows_read = filled = 0
    batches = counting.batches(args.activation_batch_size)
    wanted = args.max_steps * args.gradient_accumulation_steps
    start = time.monotonic()
    for served in range(1, wanted + 1):
        next(batches)
        if served == args.gradient_accumulation_steps:
            filled = counting.tokens_read
        if served > args.gradient_accumulation_steps and time.monotonic() - start > MOST_SECONDS:
            break
    exact = served == wanted
    # Where it was not counted to the end, as much is taken to be in the buffer then as now.
    missing = (wanted - served) * args.activation_batch_size
    read = counting.tokens_read + round(missing * counting.tokens_read / counting.rows_read)
    by_phase = {
        Phase.SCALE: scale,
        Phase.FILL: filled,
        TRAIN: read - filled,
        Phase.HELD_OUT: held_out,
        Phase.RECORD: record,
    }
    return TokensRead(by_phase, exact)


class _Counting(ModelActivations):
    """A stream like another one, whose activations have no width: no forward is needed to know how many there are."""

    def __init__(self, stream: ModelActivations) -> None:
        self.__dict__.update(stream.__dict__)
        self._cursor = self._resumed = None
        self.tokens_read = self.rows_read = 0

    def read(self, batches: Iterator[TokenBatch]) -> Iterator[dict[str, Tensor]]:
        """Count the tokens of each batch, and yield as many empty activations as it would give."""
        for batch in batches:
            self.tokens_read += ids_of(batch).numel()
            rows = int(self.count(batch).sum())
            self.rows_read += rows
            yield {self.sites[0]: torch.empty(rows, 0)}
