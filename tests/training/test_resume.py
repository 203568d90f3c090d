"""A run that was interrupted and resumed ends exactly as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, TrainingError
from hf_gated_sae.functional.cpu.features import CPU
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.training import SAETrainer, TensorActivations
from hf_gated_sae.training.recent_batches import RecentBatches
from hf_gated_sae.training.trainee import Trainee

from .runs import STEPS, log, run, trainer, weights
from .test_trainer import quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow


class StopAt(TrainerCallback):
    """Interrupts a run after a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return folder


@pytest.fixture
def broken_off(tmp_path, whole) -> Path:
    """The folder of the same run after 10 steps, with checkpoints 4 and 8."""
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, StopAt(10)).train()
    return tmp_path


def require_equal(folder: Path, whole: Path) -> None:
    expected = weights(whole)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, expected[name]), name
    assert log(folder) == log(whole)


def test_the_run_has_all_state_that_could_be_lost(whole):
    """Otherwise the tests below would prove little."""
    made = trainer(whole)
    made.train(resume_from_checkpoint=True)  # the run is finished: no step follows
    assert made.state.global_step == STEPS
    state = json.loads((whole / "checkpoint-12" / "process-0.json").read_text())["saes"]["gated"]
    assert state["remedy"]["recent"] and state["annealing"]["factor"] != 1 and state["scale_in"] != 1
    assert json.loads((whole / "checkpoint-28" / "process-0.json").read_text())["saes"]["gated"]["annealing"]["recent"]
    late = json.loads((whole / "checkpoint-40" / "process-0.json").read_text())["saes"]
    assert late["gated"]["remedy"]["resampled"] >= 10 and late["gated"]["dip_since"] == 15
    assert late["a/standard"]["remedy"]["resampled"] != late["gated"]["remedy"]["resampled"]


def test_a_kept_batch_is_stored_once(whole):
    for step in (12, 28):
        saes = json.loads((whole / f"checkpoint-{step}" / "process-0.json").read_text())["saes"]
        assert all(len(batch) == 1 for sae in saes.values() for batch in sae["annealing"]["recent"])
        assert all(len(batch) == 1 for sae in saes.values() for batch in sae["remedy"]["recent"])


def test_kept_batches_are_saved_and_loaded_unchanged():
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    batches, again = RecentBatches(), RecentBatches()
    batches.observe(x, x)
    batches.observe(x, y)
    again.load_state_dict(batches.state_dict(), x.device)
    for held in (batches, again):
        [(first, same), (second, target)] = held
        assert same is first and torch.equal(first, x) and torch.equal(second, x) and torch.equal(target, y)
    again.load_state_dict({"recent": [[x, x.clone()]]}, x.device)  # as older versions stored them
    assert len(again) == 1 and len(batches) == 2
    again.clear()
    assert not again


@pytest.mark.parametrize("step", [5, 14, 18, 31])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, whole, step):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, StopAt(step)).train()
    made = trainer(tmp_path)
    torch.manual_seed(step), random.seed(step), np.random.seed(step)  # as in another process
    made.train(resume_from_checkpoint=True)
    require_equal(tmp_path, whole)
    files = {path.name for path in tmp_path.rglob("*")}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_speeds_of_a_resumed_run_count_all_its_steps(broken_off):
    made = trainer(broken_off)
    made.train(resume_from_checkpoint=True)
    speed = made.state.log_history[-1]
    assert speed["train_steps_per_second"] * speed["train_runtime"] == pytest.approx(STEPS, rel=0.05)


@pytest.mark.parametrize("parts", [1, 2])
def test_counts_of_an_interrupted_step_are_discarded(arguments, tmp_path, monkeypatch, parts):
    """Ctrl-C in the middle of a step; then the same trainer resumes."""
    settings = {"gradient_accumulation_steps": parts, "dead_after_activations": 200, "max_steps": 12}
    settings |= {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    x = activations(500, seed=0)
    made = []
    for name in ("whole", "interrupted"):
        sae = build("gated", D_IN)
        sae.b_gate.data[::5] = -1e4  # never active
        made.append(quiet(SAETrainer(sae, arguments(output_dir=str(tmp_path / name), **settings), x.clone())))
    made[0].train()
    loss, calls = Trainee.observe, []

    def observe(trainee, *args):
        loss(trainee, *args)
        calls.append(1)
        if len(calls) == 6 * parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainee, "observe", observe)
    with pytest.raises(KeyboardInterrupt):
        made[1].train()
    made[1].train(resume_from_checkpoint=True)
    first, second = (each.trainees[""] for each in made)
    assert torch.equal(first.dead.silent_for, second.dead.silent_for) and first.dead.silent_for.any()
    assert torch.equal(first.sae.W_dec, second.sae.W_dec)


def test_a_run_that_is_killed_at_any_moment_can_be_resumed(tmp_path, whole):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs"])
    draw, killed_while_saving = random.Random(0), 0
    for moment in ("saving", "random", "saving", "random", "random"):
        child = context.Process(target=run, args=(str(tmp_path),))
        child.start()
        begun = len(list(tmp_path.glob("checkpoint-*")))
        deadline = time.monotonic() + 300
        while child.is_alive() and time.monotonic() < deadline:
            if moment == "saving" and (tmp_path / ".unfinished").is_dir():
                break
            if moment == "random" and len(list(tmp_path.glob("checkpoint-*"))) > begun:
                time.sleep(draw.uniform(0, 0.1))
                break
        child.kill()
        child.join()
        killed_while_saving += (tmp_path / ".unfinished").is_dir()
    assert killed_while_saving  # at least once half a checkpoint was left behind
    child = context.Process(target=run, args=(str(tmp_path), False))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    require_equal(tmp_path, whole)
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("file", ["gated/model.safetensors", "process-0.safetensors", "trainer_state.json"])
def test_a_broken_checkpoint_is_refused_by_name_and_skipped(broken_off, whole, file):
    path = broken_off / "checkpoint-8" / file
    content = path.read_bytes()
    for damaged, why in (
        (content[:-7], f"{file} has {len(content) - 7} bytes, expected {len(content)}"),
        (content[:-1] + bytes([content[-1] ^ 1]), f"the content of {file} has changed"),
        (None, f"{file} is missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=f"checkpoint-8 is broken: {why}.*newest whole.*checkpoint-4: pass.*--resume"
        ):
            trainer(broken_off).train(resume_from_checkpoint=str(broken_off / "checkpoint-8"))
    trainer(broken_off).train(resume_from_checkpoint=True)  # from 4
    require_equal(broken_off, whole)


def test_missing_and_incomplete_checkpoints_are_refused(broken_off, tmp_path):
    with pytest.raises(MissingFileError, match="checkpoint-5 is not a folder"):
        trainer(broken_off).train(resume_from_checkpoint=str(broken_off / "checkpoint-5"))
    (broken_off / "checkpoint-8" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        trainer(broken_off).train(resume_from_checkpoint=str(broken_off / "checkpoint-8"))
    shutil.rmtree(broken_off / "checkpoint-4")
    with pytest.raises(MissingFileError, match="no whole checkpoint"):
        trainer(broken_off).train(resume_from_checkpoint=True)


def test_other_saes_are_refused(broken_off):
    other = trainer(broken_off)
    other.trainees = {"gated": other.trainees["gated"]}
    with pytest.raises(CheckpointError, match=r"holds the SAEs 'gated', .*trains 'gated': resume with the same"):
        other.train(resume_from_checkpoint=True)
    sae = SAEModel.from_pretrained(broken_off / "checkpoint-8" / "gated")
    assert torch.isfinite(sae.W_dec).all()


def test_no_more_checkpoints_are_kept_than_wanted(tmp_path):
    trainer(tmp_path, save_total_limit=2, max_steps=39, resample_steps=[]).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-36", "checkpoint-39"}


def test_checkpoints_of_others_are_neither_counted_nor_removed(tmp_path):
    settings = {"save_total_limit": 2, "max_steps": 39, "resample_steps": []}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, StopAt(14), **settings).train()
    for other in ("checkpoint-1", "checkpoint-500", "checkpoint-final"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "model.safetensors").write_text(other)
    trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    kept = {"checkpoint-36", "checkpoint-39", "checkpoint-1", "checkpoint-500", "checkpoint-final"}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == kept
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_text() == "checkpoint-1"
    with pytest.raises(InputError, match="holds checkpoint-500, checkpoint-1, not written by an SAETrainer"):
        trainer(tmp_path, **settings).train()


def test_a_new_run_keeps_its_checkpoint_beside_a_later_one_of_another_run(broken_off):
    made = trainer(broken_off, StopAt(7), save_steps=3, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert {path.name for path in broken_off.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


def test_a_reused_stream_starts_over(tmp_path):
    settings = {"max_steps": 8, "resample_steps": [], "sparsity_power_end": 1.0}
    read = []

    class Watched(TensorActivations):
        def rows(self, rows):
            read.append(rows.clone())
            return super().rows(rows)

    def steps(made, **how):
        read.clear()
        made.train(**how)
        return torch.stack([rows for rows in read if len(rows) == 32])

    stream = Watched(activations(700, seed=0))
    first = steps(trainer(tmp_path, stream=stream, **settings))
    again = steps(trainer(tmp_path, stream=stream, **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(again, first[4:])
    assert torch.equal(steps(trainer(tmp_path, stream=stream, **settings)), first)
    trainer(tmp_path, stream=stream, **settings).train(resume_from_checkpoint=True)
    assert stream.state_dict()["position"] is not None  # loaded for a finished run, which read nothing
    assert torch.equal(steps(trainer(tmp_path, stream=stream, **settings)), first)


def test_a_new_run_beside_checkpoints_of_another_gives_a_warning(broken_off, caplog):
    with pytest.raises(KeyboardInterrupt):
        trainer(broken_off, StopAt(1)).train()
    assert "holds checkpoints of an earlier run, such as checkpoint-8" in caplog.text


def test_resuming_on_another_machine_warns_that_bits_may_differ(broken_off, caplog, monkeypatch):
    trainer(broken_off).train(resume_from_checkpoint=True)
    assert "bit for bit" not in caplog.text
    monkeypatch.setattr(SAETrainer, "_machine", "cpu, Another (AVX2)")
    trainer(broken_off).train(resume_from_checkpoint=True)
    assert f"written on cpu, {CPU}, and this is cpu, Another (AVX2): the run is continued, but not bit" in caplog.text


def test_checkpoints_without_a_training_state_cannot_be_resumed(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_is_resumed_only_with_its_own_arguments(arguments, tmp_path):
    """Only some changed arguments would take effect, and the recorded recipe would hold for no part of the run."""
    settings = {"save_strategy": "steps", "save_steps": 5, "recorded_activations": 0}
    x = activations(500, seed=0)
    quiet(SAETrainer(build("gated", D_IN), arguments(**settings), x)).train()
    for change in ({"learning_rate": 1.0}, {"sparsity_coefficient": 3.0}, {"optim": "sgd"}, {"seed": 4}):
        made = quiet(SAETrainer(build("gated", D_IN), arguments(**settings, **change), x))
        with pytest.raises(CheckpointError, match=f"other arguments: {next(iter(change))} was"):
            made.train(resume_from_checkpoint=True)
    longer = quiet(SAETrainer(build("gated", D_IN), arguments(**settings, max_steps=12), x))
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 12


@pytest.mark.parametrize("falling", [{"lr_scheduler_type": "cosine"}, {"warmup_steps": 0.5}])
def test_a_run_whose_learning_rate_depends_on_its_length_is_not_prolonged(arguments, falling):
    settings = {"save_strategy": "steps", "save_steps": 5, "recorded_activations": 0, **falling}
    x = activations(500, seed=0)
    quiet(SAETrainer(build("gated", D_IN), arguments(**settings), x)).train()
    longer = quiet(SAETrainer(build("gated", D_IN), arguments(**settings, max_steps=12), x))
    with pytest.raises(CheckpointError, match="other arguments: max_steps was 10 and is 12"):
        longer.train(resume_from_checkpoint=True)


def test_a_resumed_run_may_save_and_log_at_other_steps(arguments, tmp_path):
    settings = {"save_strategy": "steps", "recorded_activations": 0, "report_to": "none"}
    x = activations(500, seed=0)
    quiet(SAETrainer(build("gated", D_IN), arguments(**settings, save_steps=5, logging_steps=5), x)).train()
    changed = arguments(**settings, save_steps=2, logging_steps=3, max_steps=16)
    resumed = quiet(SAETrainer(build("gated", D_IN), changed, x))
    resumed.train(resume_from_checkpoint=True)
    assert [each["step"] for each in resumed.state.log_history if "l0" in each] == [5, 10, 12, 15]
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == [5, 10, 12, 14, 16]


def test_nonfinite_weights_are_never_saved_in_a_checkpoint(arguments, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 10:
                kwargs["model"].W_dec.data[3, 1] = float("nan")

    settings = {"save_strategy": "steps", "save_steps": 5, "recorded_activations": 0, "save_total_limit": 1}
    made = quiet(SAETrainer(build("gated", D_IN), arguments(**settings), activations(500, seed=0), [Poison()]))
    with pytest.raises(TrainingError, match="W_dec is no longer finite after step 10.*checkpoint-5"):
        made.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
