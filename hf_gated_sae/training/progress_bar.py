"""A progress bar that shows a run's metrics, in place of printed log lines."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .phases import Phase, PhaseCallback

SHOWN = {"loss": "loss", "l0": "L0", "fvu": "FVU", "relative_reconstruction_bias": "gamma", "dead_latents": "dead"}
"""Logged metrics shown after the bar, with their labels; loss terms come after the loss."""


class TrainingProgress(ProgressCallback, PhaseCallback):
    """Shows loss terms, L0, FVU, gamma and the number of dead latents of each SAE after the bar.

    Phases between steps have their own bars, removed when the phase has ended.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._phases: dict[Phase, tqdm[Any]] = {}

    def on_phase(self, phase: Phase, done: int, total: int) -> None:
        """Move the bar of a phase."""
        if phase not in self._phases:
            self._phases[phase] = tqdm(total=total, desc=phase, leave=False, dynamic_ncols=True, unit_scale=True)
        bar = self._phases[phase]
        bar.update(done - bar.n)
        if done >= total:
            self._phases.pop(phase).close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest metrics."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(postfix(logs), refresh=False)


def numbers(logs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the metrics to show of one log entry, by SAE and label; nothing for an entry without losses.

    All of them are of the latest batch. ``logs["loss"]`` is the mean since the previous entry, so the terms do not add
    up to it; their sum is shown instead.

    >>> numbers({"loss": 1.5, "loss_sparsity": 0.25, "loss_reconstruction": 1.0, "l0": 31.0, "dead_latents": 1200})
    {'': {'loss': '1.25', 'sparsity': '0.25', 'reconstruction': '1', 'L0': '31', 'dead': '1200'}}
    """
    found: dict[str, dict[str, str]] = {}
    terms = [value for key, value in logs.items() if key.rpartition("/")[2].startswith("loss_")]
    batch = {**logs, "loss": sum(terms) if terms else logs.get("loss")}
    for key, value in batch.items() if "loss" in logs else ():
        sae, _, name = key.rpartition("/")
        title = name.removeprefix("loss_") if name.startswith("loss_") else SHOWN.get(name)
        if title is not None:
            found.setdefault(sae, {})[title] = str(value) if isinstance(value, int) else f"{value:.3g}"
    return found


def postfix(logs: dict[str, Any]) -> str:
    """Return the text that a bar shows for one log entry.

    >>> postfix({"loss": 1.5, "loss_sparsity": 0.25, "l0": 31.0, "learning_rate": 3e-4, "dead_latents": 2})
    'loss 0.25, sparsity 0.25, L0 31, dead 2'
    """
    texts = {sae: ", ".join(f"{title} {value}" for title, value in of.items()) for sae, of in numbers(logs).items()}
    return " | ".join(f"{sae}: {text}" if sae else text for sae, text in texts.items())
