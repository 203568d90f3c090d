"""Facts of a training run for the model card, written as `training_facts.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..functional import FidelityMetrics
from .arguments import SAETrainingArguments
from .held_out import NAMES
from .trainee import Trainee

FACTS_FILE = "training_facts.json"
"""Facts of a run for the card; the keys are those of `publishing.CardFacts`."""


def write_training_facts(
    folder: Path,
    trainees: Sequence[Trainee],
    dead: Sequence[int],
    left_out: Sequence[int],
    state: TrainerState,
    args: SAETrainingArguments,
    seconds: float,
    metrics: Sequence[FidelityMetrics] | None,
) -> None:
    """Write ``training_facts.json`` beside each SAE.

    Args:
        folder: the run's ``output_dir``.
        trainees: the SAEs that were trained.
        dead: number of dead latents of each SAE.
        left_out: number of outliers that were not trained on, for each SAE.
        state: the trainer's, after the last step.
        args: the training arguments.
        seconds: duration of the run.
        metrics: of the recorded activations, for each SAE; None if there are none.
    """
    for number, trainee in enumerate(trainees):
        facts: dict[str, Any] = {
            "training": {
                **args.recipe(),
                "steps": state.global_step,
                "activations": state.global_step * args.activations_per_step,
                "seconds": round(seconds, 1),
                "dead_latents": dead[number],
                "outliers_left_out": left_out[number],
                "norm_limit": trainee.limits[0],
                "objective": asdict(trainee.objective),
                "sparsity_coefficient": trainee.coefficient,
            }
        }
        if curve := held_out_curve(trainee.name, state.log_history, args.activations_per_step):
            facts["curve"] = curve
        if metrics is not None:
            measured = asdict(metrics[number])
            tokens = measured.pop("tokens")
            facts["metrics"] = {name: value if math.isfinite(value) else None for name, value in measured.items()}
            facts["evaluation"] = {"dataset": "activations of the training stream", "tokens": tokens}
        text = json.dumps(facts, indent=2, allow_nan=False)
        (folder / trainee.name / FACTS_FILE).write_text(text + "\n", encoding="utf-8")


def held_out_curve(
    name: str, history: Sequence[Mapping[str, Any]], activations_per_step: int
) -> list[dict[str, float | None]]:
    """Return an SAE's metrics on held-out text during a run, one row per evaluation; None for an undefined ratio.

    Args:
        name: of the SAE among several; empty for a single SAE.
        history: the log entries of the trainer.
        activations_per_step: of all processes.
    """
    lead = f"eval_{name}/" if name else "eval_"
    rows: list[dict[str, float | None]] = []
    for line in history:
        if f"{lead}loss_recovered" in line:
            values = {key: float(line[f"{lead}{key}"]) for key in NAMES}
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            rows.append({"step": line["step"], "activations": line["step"] * activations_per_step, **finite})
    return rows
