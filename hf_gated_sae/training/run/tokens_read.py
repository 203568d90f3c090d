"""The number of tokens that a run's model reads, counted on the text itself without a forward."""

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
"""Time limit of counting, after which the rest of a run is extrapolated."""
TRAIN = "training"
"""Name of the reading between the steps, among the names of the phases."""


@dataclass(frozen=True)
class TokensRead:
    """Tokens that the model of one process reads in a run, padding and special tokens included.

    Attributes:
        by_phase: tokens by phase, and under `TRAIN` those read between the steps.
        exact: whether all of them were counted; otherwise the later steps are extrapolated from the earlier ones.
    """

    by_phase: Mapping[str, int]
    exact: bool

    @property
    def total(self) -> int:
        """Tokens of all phases."""
        return sum(self.by_phase.values())


def count_tokens(stream: ModelActivations, args: SAETrainingArguments, measured: int) -> TokensRead:
    """Count the tokens of a run that reads its text with a model.

    Args:
        stream: of activations, with all sizes chosen.
        args: the training arguments.
        measured: number of SAEs that are evaluated on held-out text.
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
    # The extrapolation assumes that the buffer holds the same number of activations at the end as now.
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
    """A copy of a stream that yields activations of width 0: counting them needs no forward."""

    def __init__(self, stream: ModelActivations) -> None:
        self.__dict__.update(stream.__dict__)
        self._cursor = self._resumed = None
        self.tokens_read = self.rows_read = 0

    def read(self, batches: Iterator[TokenBatch]) -> Iterator[dict[str, Tensor]]:
        """Count the tokens of each batch, and yield empty activations in the number that it would produce."""
        for batch in batches:
            self.tokens_read += ids_of(batch).numel()
            rows = int(self.count(batch).sum())
            self.rows_read += rows
            yield {self.sites[0]: torch.empty(rows, 0)}
