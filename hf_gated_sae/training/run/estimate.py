"""The cost of a run: memory, operations and time, measured on a few real steps or estimated from sizes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...errors import InputError
from ...evaluation.fidelity import FORWARDS
from ...modeling import SAEModel
from ...sites import Site
from ..arguments import SAETrainingArguments
from ..held_out import HeldOut
from ..memory import TrainingMemory, available_memory, in_bytes, short
from ..phases import Phase
from ..sharding import whole_config
from ..streams import ModelActivations
from ..trainee import Trainee
from .assembly import arguments
from .base_model import load_config
from .run_config import DataSettings, RunConfig
from .run_parts import base_model, build, new_saes
from .run_text import sized
from .timing import held_out_seconds, time_reading, time_steps, wait
from .tokens_read import TRAIN, TokensRead, count_tokens

LOAD = "loading"
"""Name of the work before the first phase of a run, among the names of the phases."""


@dataclass(frozen=True)
class Cost:
    """Cost of one step of the SAEs, or of one token that the model reads.

    Attributes:
        operations: floating-point operations if all latents are computed; fewer are needed if most are inactive.
        seconds: duration.
    """

    operations: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        measured: whether steps were run; otherwise computed from sizes and the speed of one matrix product.
        parameters: of each SAE by name; if processes share it, of this process's part, like all that follows.
        memory: of the SAEs.
        activations: bytes that a step holds between forward and backward.
        buffer: bytes of the activations held for shuffling.
        saved: bytes of the buffer that are written into every checkpoint.
        model: bytes of the base model; 0 without one.
        available: bytes available to the run on the SAEs' device; None if that is not known.
        steps: number of steps.
        batch: activations per step, of all processes.
        tokens: that the model reads in the whole run.
        training: cost of a step of the SAEs.
        reading: cost of a token that the base model reads up to the last site.
        seconds: duration of each phase of the run, by its name; also of `TRAIN`, the steps and the reading between
            them, and, if it was measured, of `LOAD`.
    """

    measured: bool
    parameters: Mapping[str, int]
    memory: TrainingMemory
    activations: int
    buffer: int
    saved: int
    model: int
    available: int | None
    steps: int
    batch: int
    tokens: TokensRead
    training: Cost
    reading: Cost
    seconds: Mapping[str, float]

    @property
    def time(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def operations(self) -> float:
        """Floating-point operations of the whole run."""
        read = self.tokens.total - self.tokens.by_phase[Phase.HELD_OUT]
        return self.steps * self.training.operations + read * self.reading.operations

    @property
    def total(self) -> int:
        """Peak memory in bytes, if everything is on one device."""
        return self.memory.total(0) + self.activations + self.buffer + self.model

    @property
    def checkpoint(self) -> int:
        """Bytes of each checkpoint on disk."""
        return self.memory.weights + self.memory.moments + self.saved

    @property
    def _fits(self) -> str:
        if self.available is None:
            return ""
        fits = "fits" if self.total < self.available else "DOES NOT FIT"
        return f"{fits} into the {in_bytes(self.available)} that are free here"

    def tables(self) -> dict[str, list[tuple[str, str, str]]]:
        """Return the estimate as tables for display: by title, rows of name, value and remark."""
        how = "measured" if self.measured else "estimated"
        size = [(f"parameters{f' of {name}' if name else ''}", f"{n:,}", "") for name, n in self.parameters.items()]
        found = {
            "Memory": [
                *size,
                ("weights", in_bytes(self.memory.weights), ""),
                ("gradients", in_bytes(self.memory.gradients), ""),
                ("Adam's moments", in_bytes(self.memory.moments), ""),
                ("activations", in_bytes(self.activations), f"of one step, {how}"),
                ("shuffle buffer", in_bytes(self.buffer), ""),
                *([("base model", in_bytes(self.model), "weights alone")] if self.model else []),
                ("in all", in_bytes(self.total), self._fits),
            ],
            f"Speed ({how})": [
                ("a step", in_time(self.training.seconds), f"{short(self.training.operations)}FLOP, without reading"),
            ],
            "The whole run": [
                ("steps", f"{self.steps:,}", f"of {self.batch:,} activations"),
                ("activations", f"{self.steps * self.batch:,}", "trained on"),
                ("operations", f"{short(self.operations)}FLOP", ""),
                ("checkpoint", in_bytes(self.checkpoint), f"on disk, of which {in_bytes(self.saved)} is the buffer"),
            ],
        }
        run = found["The whole run"]
        if self.tokens.total:
            speed = f"{1 / self.reading.seconds:,.0f} tokens per second"
            found[f"Speed ({how})"].append(("the model reads", speed, ""))
            about = "" if self.tokens.exact else "about"
            run.append(("tokens", f"{self.tokens.total:,}", f"{about} read by the model, padding included".strip()))
        for phase, seconds in self.seconds.items():
            tokens = self.tokens.by_phase.get(phase, 0)
            if seconds or tokens:
                run.append((f"  {phase}", in_time(seconds), f"{tokens:,} tokens" if tokens else ""))
        run.append(("time", in_time(self.time), f"{self.steps * self.batch / self.time:,.0f} activations per second"))
        return found


def estimate(config: RunConfig) -> Estimate:
    """Estimate the cost from sizes; only the model's configuration is read, and nothing is run.

    Args:
        config: the run.

    Raises:
        InputError: if the width of a site cannot be known without the model.
    """
    args = arguments(config)
    rate = _rate(args.device)
    if config.model is None:
        raise InputError("A run on activations on disk has no model to estimate from: omit --no-measure.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(load_config(config.model))
    text = model.config.get_text_config()
    widths = {site: _width(site, text.hidden_size) for sae in config.named.values() for site in _sites(sae)}
    with torch.device("meta"):
        saes = new_saes(config, widths, {"base_model": base_model(config.model)}, torch.device("meta"))
    data = sized(config.data, args, model)
    buffer = (data.buffer_size or 0) * sum(widths.values()) * _dtype(config, model).itemsize
    reading = _share_of_layers(widths, model.config) * _reading_operations(model)
    training = _learning_operations(saes) * args.activations_per_step
    tokens = _estimated_tokens(args, data, len(saes))
    costs = Cost(training, training / rate), Cost(reading, reading / rate)
    whole = _reading_operations(model) / rate
    return Estimate(
        measured=False,
        **_common(config, saes, args),
        activations=TrainingMemory.of(saes.values()).per_activation * args.activation_batch_size,
        buffer=buffer,
        saved=buffer if data.save_buffer else 0,
        model=sum(each.numel() for each in model.parameters()) * _dtype(config, model).itemsize,
        tokens=tokens,
        training=costs[0],
        reading=costs[1],
        seconds=_seconds(tokens, args, *costs, held_out=whole, recording=training / 3 / rate),
    )


def measured(config: RunConfig, *, before: float = 0.0) -> Estimate:
    """Build every part of a run, count its tokens, and time a few steps on real activations; nothing is written.

    The SAEs have their initial weights, with which more latents are active than later: steps become faster.

    Args:
        config: the run.
        before: seconds before this call that the run will take as well, such as those of imports.
    """
    start = time.perf_counter()
    parts = build(config)
    loading = before + time.perf_counter() - start
    args, model, stream = parts.arguments, parts.model, parts.stream
    share = 0.0 if model is None else _share_of_layers(stream.sites, model.config)
    tokens, buffer, held_out = TokensRead(dict.fromkeys((*Phase, TRAIN), 0), True), 0, 0.0
    if isinstance(stream, ModelActivations):
        evaluated = HeldOut.of(stream, [Trainee(name, sae, args, stream) for name, sae in parts.saes.items()])
        tokens = count_tokens(stream, args, len(evaluated.trainees) if evaluated else 0)
        buffer = stream.buffer_bytes
        held_out = held_out_seconds(evaluated) if evaluated else 0.0
    reading, x = time_reading(parts)
    training, recording, activations = time_steps(parts, x)
    costs = (
        Cost(_learning_operations(parts.saes) * args.activations_per_step, training),
        Cost(share * _reading_operations(model), reading),
    )
    return Estimate(
        measured=True,
        **_common(config, parts.saes, args),
        activations=activations,
        buffer=buffer,
        saved=buffer if config.data.save_buffer else 0,
        model=0 if model is None else sum(each.numel() * each.element_size() for each in model.parameters()),
        tokens=tokens,
        training=costs[0],
        reading=costs[1],
        seconds={LOAD: loading} | _seconds(tokens, args, *costs, held_out=held_out, recording=recording),
    )


def _estimated_tokens(args: SAETrainingArguments, data: DataSettings, saes: int) -> TokensRead:
    """Return the approximate number of tokens that a run reads, assuming one activation per token."""
    activations = args.max_steps * args.activation_batch_size * args.gradient_accumulation_steps
    filled = data.buffer_size or 0
    held_out = FORWARDS * (data.held_out_tokens or 0) * len(args.evaluation_steps) * saes
    by_phase = {
        Phase.SCALE: args.statistics_activations or 0,
        Phase.FILL: filled,
        TRAIN: max(activations - filled // 2, 0),
        Phase.HELD_OUT: held_out,
        Phase.RECORD: args.recorded_activations or 0,
    }
    return TokensRead(by_phase, exact=False)


def _seconds(
    tokens: TokensRead, args: SAETrainingArguments, training: Cost, reading: Cost, *, held_out: float, recording: float
) -> dict[str, float]:
    """Return the duration of each phase in seconds.

    Args:
        tokens: read in each phase.
        args: the training arguments.
        training: cost of a step.
        reading: cost of a token that is read up to the last site.
        held_out: seconds per token of an evaluation on held-out text.
        recording: seconds to record one activation, without reading it.
    """
    found = {phase: tokens.by_phase[phase] * reading.seconds for phase in (Phase.SCALE, Phase.FILL, TRAIN)}
    found[TRAIN] += args.max_steps * training.seconds
    found[Phase.HELD_OUT] = tokens.by_phase[Phase.HELD_OUT] * held_out
    recorded = args.recorded_activations or 0
    found[Phase.RECORD] = tokens.by_phase[Phase.RECORD] * reading.seconds + recorded * recording
    return found


def _dtype(config: RunConfig, model: Any) -> torch.dtype:
    """Return the dtype of a model's weights: the run's setting, else that of the model's configuration."""
    named = getattr(torch, config.model.dtype, None) if config.model else None
    return named or model.dtype


def _learning_operations(saes: Mapping[str, SAEModel]) -> float:
    """Return the operations per activation of forward and backward passes on all latents: 6 per weight."""
    return sum(6.0 * (sae.config.d_in + sae.d_out) * whole_config(sae).d_sae for sae in saes.values())


def _reading_operations(model: Any) -> float:
    """Return the operations per token of a whole forward: 2 per weight, without embeddings and attention scores."""
    if model is None:
        return 0.0
    return 2.0 * (sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel())


def _share_of_layers(sites: Iterable[str], config: Any) -> float:
    """Return the share of the layers up to the last site; 1 if a site has no layer."""
    layers = config.get_text_config().num_hidden_layers
    numbers = [Site.parse(site).layer for site in sites]
    return 1.0 if None in numbers else (max(number or 0 for number in numbers) + 1) / layers


def _common(config: RunConfig, saes: Mapping[str, SAEModel], args: Any) -> dict[str, Any]:
    """Return the fields of an `Estimate` that are known without running anything."""
    return {
        "parameters": {name: sum(each.numel() for each in sae.parameters()) for name, sae in saes.items()},
        "memory": TrainingMemory.of(saes.values()),
        "available": available_memory(args.device),
        "steps": args.max_steps,
        "batch": args.activations_per_step,
    }


def _rate(device: torch.device, size: int = 1024) -> float:
    """Return the operations per second of a matrix product."""
    a = torch.randn(size, size, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _sites(sae: Any) -> Iterator[str]:
    yield from (site for site in (sae.site, sae.site_out) if site)


def _width(site: str, hidden: int) -> int:
    """Return the width of a site with the width of the residual stream.

    Raises:
        InputError: for a site of another width.
    """
    if Site.parse(site).name not in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        raise InputError(f"The width of {site} is known only once the model is loaded: omit --no-measure.")
    return hidden


def in_time(seconds: float) -> str:
    """Return a human-readable duration.

    >>> in_time(0.0042), in_time(4000)
    ('4.2 ms', '1.1 h')
    """
    for size, unit in ((86_400 * 2, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / min(size, 86_400):.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
