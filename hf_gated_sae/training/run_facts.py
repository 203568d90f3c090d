"""What a run leaves for a model card."""

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
"""What a card can say of a run; the keys are those of `publishing.CardFacts`."""


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
        trainees: what was trained.
        dead: how many latents of each SAE are dead.
        left_out: how many activations were not learned for their norm, for each SAE.
        state: the trainer's, after the last step.
        args: the recipe.
        seconds: how long the run took.
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
    """Return what was measured of an SAE on held-out text during a run, a row for each time; a ratio may be undefined.

    Args:
        name: of the SAE among several; empty if it is alone.
        history: what the trainer has logged.
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
