"""What a run leaves for a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..functional import FidelityMetrics
from .arguments import SAETrainingArguments
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
        if metrics is not None:
            measured = asdict(metrics[number])
            tokens = measured.pop("tokens")
            facts["metrics"] = {name: value if math.isfinite(value) else None for name, value in measured.items()}
            facts["evaluation"] = {"dataset": "activations of the training stream", "tokens": tokens}
        text = json.dumps(facts, indent=2, allow_nan=False)
        (folder / trainee.name / FACTS_FILE).write_text(text + "\n", encoding="utf-8")
