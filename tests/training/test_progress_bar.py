"""The progress bar and the printed lines of a run."""

from __future__ import annotations

import pytest
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_gated_sae.training import SAETrainer
from hf_gated_sae.training.progress_bar import TrainingProgress, postfix

from .runs import trainer
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow


class Spy(TrainerCallback):
    """Receives logs as TensorBoard, trackio and wandb do."""

    def __init__(self) -> None:
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_the_bar_shows_terms_and_metrics_and_no_lines_of_numbers(arguments, capsys):
    spy = Spy()
    SAETrainer(build("gated", D_IN), arguments(disable_tqdm=False), activations(500, seed=0), callbacks=[spy]).train()
    seen = capsys.readouterr()
    shown = postfix(spy.lines[1])
    assert seen.out == "" and shown in seen.err and "{" not in seen.err
    for name in ("loss", "reconstruction", "sparsity", "auxiliary", "L0", "FVU", "gamma", "dead"):
        assert f"{name} " in shown


def test_without_a_bar_lines_are_printed(arguments, capsys):
    SAETrainer(build("gated", D_IN), arguments(disable_tqdm=True), activations(500, seed=0)).train()
    seen = capsys.readouterr()
    assert "'fvu'" in seen.out and "it/s" not in seen.err


def test_our_bar_is_removed_as_transformers_own_is(arguments, capsys):
    made = SAETrainer(build("gated", D_IN), arguments(disable_tqdm=False), activations(500, seed=0))
    assert isinstance(made.pop_callback(ProgressCallback), TrainingProgress)
    made.train()
    assert capsys.readouterr() == ("", "")


def test_the_bar_names_each_of_several_saes(tmp_path):
    spy = Spy()
    made = trainer(tmp_path, spy, max_steps=32, save_strategy="no")
    assert made.pop_callback(PrinterCallback) is None
    made.train()
    first, second = postfix(spy.lines[0]).split(" | ")[1:]
    assert first.startswith("gated: loss ") and second.startswith("a/standard: loss ")
    assert [line["epoch"] for line in spy.lines[:3]] == pytest.approx([3 / 32, 6 / 32, 9 / 32])
