"""A run with all the state that must survive an interruption, which tests can start in a process and kill."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.training import ActivationStream, SAETrainer, SAETrainingArguments

from .worlds import D_IN, activations, build

STEPS = 40


class Slow(TrainerCallback):
    """Slows a run down, so that it can be interrupted."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.01)


class Noise(TrainerCallback):
    """Makes the weights depend on the global random generators."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _, sae in kwargs["model"].items():
            sae.b_dec.data += 1e-3 * (torch.randn_like(sae.b_dec) + random.random() + np.random.rand())


def trainer(
    folder: Path, *callbacks: TrainerCallback, stream: ActivationStream | None = None, **changes: Any
) -> SAETrainer:
    """Return a trainer of two SAEs, one with dead latents, with resampling, dips, annealing and frequent checkpoints.

    What happens between steps 4 and 36 depends on batches of up to 10 steps before.
    """
    gated = build("gated", D_IN)
    gated.b_gate.data[:10] = -1e6
    saes = {"gated": gated, "a/standard": build("standard", D_IN, 40)}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": STEPS,
        "activation_batch_size": 32,
        "learning_rate": 3e-3,
        "warmup_steps": 10,
        "sparsity_warmup_steps": 10,
        "sparsity_coefficient": {"gated": 0.5, "a/standard": 1.0},
        "sparsity_power_end": 0.7,
        "sparsity_power_steps": [10, 30],
        "sparsity_power_changes": 3,
        "sparsity_power_batches": 6,
        "dead_after_activations": 200,
        "resample_steps": [15, 33],
        "resample_inputs": 256,
        "lr_dip_steps": 9,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "statistics_activations": 500,
        "recorded_activations": 500,
    }
    made = SAETrainer(
        saes,
        SAETrainingArguments(**{**settings, **changes}),
        activations(700, seed=0, scale=20.0) if stream is None else stream,
        [Noise(), *callbacks],
    )
    made.remove_callback(PrinterCallback)
    return made


def run(folder: str, slow: bool = True) -> None:
    """Train, from the newest whole checkpoint if there is any."""
    torch.set_num_threads(1)
    made = trainer(Path(folder), *([Slow()] if slow else []))
    made.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of both SAEs."""
    saes = {name: SAEModel.from_pretrained(folder / name) for name in ("gated", "a/standard")}
    return {f"{name}.{key}": tensor for name, sae in saes.items() for key, tensor in sae.state_dict().items()}


def log(folder: Path, step: int = STEPS) -> list[dict[str, Any]]:
    """Return the log up to a checkpoint."""
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
