"""Timing the parts of a run on a few real batches: reading, a step, recording, and evaluation on held-out text."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PrinterCallback, TrainerCallback

from ...evaluation.fidelity import FORWARDS
from ...hooks.token_batches import TokenBatch, TokenBatches
from ...modeling import SAEModel
from ..held_out import HeldOut
from ..recording import record_activations
from ..streams import ModelActivations, TensorActivations
from ..streams.tokens import ids_of, rows_of
from ..trainer import SAETrainer
from .assembly import arguments
from .run_parts import Parts

STEPS = 6
"""Steps that are run, of which the first two are not timed."""
READ_BATCHES, READ_SECONDS = 8, 2.0
"""Largest number of batches of tokens read to time reading, and the time after which no further one is read."""
MEASURED_TOKENS = 2048
"""Number of held-out tokens evaluated, and of activations recorded, to time both."""


def held_out_seconds(held_out: HeldOut) -> float:
    """Return the seconds per token and forward of an evaluation on held-out text."""
    few = replace(held_out, batches=list(_first(held_out.batches, MEASURED_TOKENS)))
    tokens = sum(ids_of(batch).numel() for batch in few.batches)
    start = time.perf_counter()
    few.measure(lambda *_: None)
    return (time.perf_counter() - start) / (FORWARDS * tokens * len(few.trainees))


def _first(batches: TokenBatches, tokens: int) -> Iterator[TokenBatch]:
    """Yield the first sequences of some batches, up to a number of tokens; at least one sequence."""
    for batch in batches:
        ids = ids_of(batch)
        rows = max(1, tokens // ids.shape[-1])
        yield rows_of(batch, slice(rows)) if rows < len(ids) else batch
        tokens -= ids.numel()
        if tokens <= 0:
            return


def time_reading(parts: Parts) -> tuple[float, dict[str, Tensor]]:
    """Return the seconds per token of reading, and some activations."""
    stream = parts.stream
    if not isinstance(stream, ModelActivations):
        return 0.0, next(stream.sample(4096))
    batches = stream.tokens.open()
    first = next(batches)
    pieces = list(stream.read(iter([first])))  # the first one is slower
    tokens, seconds = 0, 0.0
    for batch in islice(chain(batches, repeat(first)), READ_BATCHES):
        start = time.perf_counter()
        pieces += stream.read(iter([batch]))
        wait(parts.arguments.device)
        seconds += time.perf_counter() - start
        tokens += ids_of(batch).numel()
        if seconds > READ_SECONDS:
            break
    return seconds / tokens, {site: torch.cat([piece[site] for piece in pieces]) for site in stream.sites}


def time_steps(parts: Parts, x: Mapping[str, Tensor]) -> tuple[float, float, int]:
    """Return the seconds of a step of all SAEs, those to record an activation, and the bytes that a step holds."""
    wanted = parts.arguments.activation_batch_size
    stream = _RepeatedActivations(x, max(2, parts.grid.data.count) * wanted)
    held = _bytes_held(parts, stream.rows(torch.arange(wanted)))
    with tempfile.TemporaryDirectory() as scratch:
        return *_timed(parts, stream, scratch), held


def _bytes_held(parts: Parts, batch: Mapping[str, Tensor]) -> int:
    """Return the bytes that a step of all SAEs on a batch ``[n, d]`` by site holds for its backward pass."""
    held = 0
    for sae in parts.saes.values():
        x = batch[parts.stream.key(sae.config.site)].to(sae.W_dec)
        target = batch[parts.stream.key(sae.config.site_out)].to(sae.W_dec) if sae.config.site_out else None
        saved = _SavedBytes(sae)
        with saved:
            sae.training_loss(x, target=target, sparsity_coefficient=1.0).total.backward()
        held += saved.bytes
        sae.zero_grad(set_to_none=True)
    return held


def _timed(parts: Parts, stream: TensorActivations, scratch: str) -> tuple[float, float]:
    """Return the median time of a trainer's step, and the time to record an activation, in seconds."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    typical = {
        "resample_steps": [],
        "sparsity_power_end": 1.0,
        "sparsity_warmup_steps": 0,
    }  # as in most steps of a run
    args = arguments(parts.config, output_dir=scratch, max_steps=STEPS, recorded_activations=0, **quiet, **typical)
    clock = _Clock(args.device)
    saes = {name: copy.deepcopy(sae) for name, sae in parts.saes.items()}
    alone = saes.get("")
    trainer = SAETrainer(saes if alone is None else alone, args, stream, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    sample = stream.rows(torch.arange(MEASURED_TOKENS))
    start = time.perf_counter()
    record_activations(list(trainer.trainees.values()), [sample])
    wait(args.device)
    return sorted(clock.seconds[2:])[(STEPS - 2) // 2], (time.perf_counter() - start) / MEASURED_TOKENS


class _RepeatedActivations(TensorActivations):
    """A few activations repeated up to a number of rows, without using more memory.

    Args:
        activations: ``[n, d]`` by site.
        count: number of rows.
    """

    def __init__(self, activations: Mapping[str, Tensor], count: int) -> None:
        super().__init__(activations)
        self.count = count

    def __len__(self) -> int:
        """Number of rows, including the repeated ones."""
        return self.count

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Return some rows, site -> ``[n, d]``."""
        return super().rows(rows % super().__len__())


class _Clock(TrainerCallback):
    """Times every step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait(self.device)
        self.seconds.append(time.perf_counter() - self._start)


class _SavedBytes(saved_tensors_hooks):
    """Counts the bytes that autograd saves for a backward pass, besides the parameters."""

    def __init__(self, sae: SAEModel) -> None:
        super().__init__(self._note, lambda tensor: tensor)
        self._known = {each.untyped_storage().data_ptr() for each in sae.parameters()}
        self.bytes = 0

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def wait(device: torch.device) -> None:
    """Wait until a device has finished its queued work, so that times are meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
