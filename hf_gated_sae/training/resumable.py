"""Checkpoints of an `SAETrainer`: written atomically, without pickles, with all state that training depends on."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..errors import CheckpointError, InputError, MissingFileError, SAEError, TrainingError
from ..functional.cpu.features import CPU
from . import checkpoints
from .arguments import ARGUMENTS_FILE, SAETrainingArguments
from .randomness import random_state, restore_random_state
from .sharding import Grid, load_part, save_whole
from .state_files import read_state, write_state
from .streams import ActivationStream
from .trainee import Trainee

OPTIMIZER_FILE = "optimizer"
"""State of optimiser, schedule and gradient scaler; the same in all processes that hold the same latents."""

PROCESS_FILE = "process-{rank}"
"""State of each process: its stream, its random generators, and the training state of its SAEs."""

_log = logging.getLogger(__name__)


class Resumable(Trainer):
    """The part of `SAETrainer` that writes checkpoints and resumes from them.

    A checkpoint holds the SAEs as `from_pretrained` reads them, in the model's activation unit, and the state with
    which training continues bit for bit as if it had not been interrupted.
    """

    args: SAETrainingArguments
    trainees: dict[str, Trainee]
    stream: ActivationStream
    grid: Grid
    optimizer: Any
    lr_scheduler: Any
    _writing: bool = False
    _seconds: float = 0.0
    _since: float = 0.0

    # ------------------------------------------------------------------ writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint into a temporary folder, and move it to its name when it is whole.

        Raises:
            CheckpointError: in all processes, if one of them cannot write; older checkpoints stay.
            TrainingError: if a weight is not finite, so that no run could resume from it.
        """
        run, everyone = Path(self._get_output_dir(trial)), self.grid.everyone
        target = run / f"checkpoint-{self.state.global_step}"
        everyone.raise_first(self._nonfinite_weight(target), TrainingError)
        with checkpoints.writing(target, everyone):
            if everyone.rank == 0:
                checkpoints.begin(target)
        self._writing = True
        try:
            with checkpoints.writing(target, everyone):
                super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        checkpoints.complete(target, everyone)
        if everyone.rank == 0:
            checkpoints.rotate(target, self.args.save_total_limit)

    def _nonfinite_weight(self, target: Path) -> TrainingError | None:
        """Return the error of a non-finite weight: a checkpoint with it must not replace older ones."""
        for name, trainee in self.trainees.items():
            for parameter, values in trainee.sae.named_parameters():
                if not torch.isfinite(values).all():
                    of = f" of the SAE {name!r}" if name else ""
                    return TrainingError(
                        f"The parameter {parameter}{of} is no longer finite after step {self.state.global_step}, so "
                        f"no checkpoint was written. {checkpoints.advice(target.parent)}"
                    )
        return None

    def _require_shared_disk(self, *, resumes: bool) -> None:
        """Raise unless all processes see the same `output_dir`, where checkpoints are written and read.

        Args:
            resumes: whether a checkpoint is read.

        Raises:
            InputError: in all of them.
        """
        everyone, folder = self.grid.everyone, Path(self.args.output_dir)
        if everyone.alone or (self.args.save_strategy == "no" and not resumes):
            return
        marker = folder / f".seen-by-all-{everyone.number_of_first(secrets.randbits(48))}"
        error: SAEError | None = None
        try:
            if everyone.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                marker.touch()
        except OSError as why:
            error = InputError(f"output_dir is {folder}, which cannot be written to ({why.strerror}).")
        try:
            everyone.raise_first(error)
            if not marker.exists():
                error = InputError(
                    f"output_dir is {folder.absolute()}, where not all processes see the files of the first one: give "
                    "an output_dir on a disk that all of them share."
                )
            everyone.raise_first(error)
        finally:
            if everyone.rank == 0:
                marker.unlink(missing_ok=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the SAEs in the model's activation unit; several SAEs each in the subfolder of their name.

        Args:
            output_dir: folder; the run's ``output_dir`` by default.
            _internal_call: set by transformers for a checkpoint.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self._saves:
            return
        for name, trainee in self.trainees.items():
            with trainee.in_model_unit():
                save_whole(trainee.sae, folder / name)
        if self.args.should_save:
            self.args.write_recipe(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the state of the optimiser, the schedule and the gradient scaler."""
        if self._saves:
            write_state(Path(output_dir), self._optimizer_file, self._shared_state())

    def _shared_state(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        scaler = self.accelerator.scaler
        return {
            "optimizer": {
                "state": {str(number): values for number, values in optimizer["state"].items()},
                "param_groups": optimizer["param_groups"],
            },
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": self.args.world_size,
        }

    def _save_scaler(self, output_dir: str) -> None:
        """Do nothing: the scaler is written with the optimiser."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the state that is specific to this process."""
        state = {
            "random": random_state(self.args.device),
            "stream": self.stream.state_dict(),
            "saes": {name: trainee.state_dict() for name, trainee in self.trainees.items()},
            "loss_since_log": self._tr_loss,
            "loss_before": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged,
            "seconds": self.seconds,
            "machine": self._machine,
        }
        write_state(Path(output_dir), self._process_file, state)

    @property
    def _machine(self) -> str:
        """What the processor is and multiplies fast; on another one sums round differently."""
        device = self.args.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {CPU}"

    @property
    def _saves(self) -> bool:
        """Whether this process takes part in writing the SAEs: one process, or the first group that shares them."""
        return self.args.should_save if self.grid.latents.alone else self.grid.data.rank == 0

    @property
    def _optimizer_file(self) -> str:
        rank = self.grid.latents.rank
        return f"{OPTIMIZER_FILE}-{rank}" if rank else OPTIMIZER_FILE

    @property
    def _process_file(self) -> str:
        return PROCESS_FILE.format(rank=self.args.process_index)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run's folder, or, while a checkpoint is written, the folder of unfinished checkpoints."""
        run = Path(super()._get_output_dir(trial))
        return str(checkpoints.unfinished(run / "checkpoint").parent if self._writing else run)

    @property
    def seconds(self) -> float:
        """Training time of the run, including that before it was resumed."""
        return self._seconds + (time.monotonic() - self._since if self._since else 0.0)

    # ------------------------------------------------------------------ resuming

    def find_checkpoint(self, given: str | Path | bool | None) -> Path | None:
        """Return the checkpoint to resume from, after verifying all of its files.

        Args:
            given: a folder; True for the newest whole one of ``output_dir``; None or False for none.

        Raises:
            InputError: if none is asked for, and ``output_dir`` holds checkpoints of other programs.
            MissingFileError: if there is none.
            CheckpointError: if the given one is broken, naming the file and the newest whole one.
        """
        found, error = None, None
        try:
            found = self._find_checkpoint(given)
        except SAEError as why:
            error = why
        self.grid.everyone.raise_first(error, CheckpointError)
        return found

    def _find_checkpoint(self, given: str | Path | bool | None) -> Path | None:
        everyone = self.grid.everyone
        run = Path(self.args.output_dir)
        if given is None or given is False:
            others = checkpoints.checkpoints(run)
            if unknown := [path.name for path in others if checkpoints.lacks_manifest(path)]:
                raise InputError(
                    f"{run} holds {', '.join(unknown[:3])}, not written by an SAETrainer (without a "
                    f"{checkpoints.MANIFEST}), which checkpoints of this run could replace: choose another output_dir."
                )
            if others:
                _log.warning(
                    "%s holds checkpoints of an earlier run, such as %s: resuming would take the one with the most "
                    "steps, whichever run wrote it. Remove them, or choose another output_dir.",
                    run,
                    others[0].name,
                )
            return None
        if given is True:
            newest = checkpoints.newest_whole(run, everyone)
            if newest is None:
                raise MissingFileError(f"There is no whole checkpoint in {run}; start a new run, without resuming.")
            checkpoint = newest
        else:
            checkpoint = Path(given)
            checkpoints.verify(checkpoint, everyone)
        if not (checkpoint / f"{OPTIMIZER_FILE}.json").is_file():
            raise CheckpointError(
                f"{checkpoint} holds the SAEs only (save_only_model=True): load them and start a new run."
            )
        self._require_same_recipe(checkpoint)
        return checkpoint

    def _require_same_recipe(self, checkpoint: Path) -> None:
        """Raise if the checkpoint was written with other arguments, of which only some would take effect."""
        before = json.loads((checkpoint / ARGUMENTS_FILE).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(self.args.recipe()))
        deciding = [name for name in now if name not in self.args.changeable_on_resume]
        changed = [name for name in deciding if before.get(name) != now[name]]
        if changed:
            each = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed[:4])
            raise CheckpointError(
                f"{checkpoint} is of a run with other arguments: {each}. Resume with the same, or load its SAE and "
                "start a new run."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the SAEs' weights, in the model's activation unit."""
        for name, trainee in self.trainees.items():
            stored = load_part(Path(resume_from_checkpoint) / name, processes=self.grid.latents)
            sae, state = trainee.sae, stored.state_dict()
            expected, found = sae.config, stored.config
            shapes = {key: tuple(tensor.shape) for key, tensor in sae.state_dict().items()}
            if type(stored) is not type(sae) or shapes != {key: tuple(tensor.shape) for key, tensor in state.items()}:
                raise CheckpointError(
                    f"{Path(resume_from_checkpoint) / name} holds a {type(stored).__name__} with d_in = {found.d_in} "
                    f"and d_sae = {found.d_sae}; this run trains a {type(sae).__name__} with d_in = {expected.d_in} "
                    f"and d_sae = {expected.d_sae}. Resume the run that wrote it."
                )
            sae.load_state_dict(state)
            sae.config.record(found.recorded_tokens, None)
            left_out, ids = found.special_token_ids, trainee.special_ids
            if left_out is not None and ids is not None and sorted(left_out) != sorted(ids):
                raise CheckpointError(
                    f"{Path(resume_from_checkpoint) / name} was trained without the tokens {left_out}, and this run "
                    f"leaves out {list(ids)}: resume with the same tokenizer."
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore what `_save_optimizer_and_scheduler` wrote."""
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint), self._optimizer_file)
        if state["processes"] != self.args.world_size:
            raise CheckpointError(
                f"{checkpoint} was written by {state['processes']} processes, and this run has "
                f"{self.args.world_size}: resume with {state['processes']}, as each reads its own part of the text."
            )
        saved = state["optimizer"]
        numbered = {int(number): values for number, values in saved["state"].items()}
        try:
            self.optimizer.load_state_dict({"state": numbered, "param_groups": saved["param_groups"]})
        except ValueError as error:
            self._require_same_saes(checkpoint, read_state(Path(checkpoint), self._process_file)["saes"])
            raise CheckpointError(f"{checkpoint} was trained with another objective: {error}") from error
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the scaler is read with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore what `_save_rng_state` wrote; transformers calls this right before the first batch."""
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint), self._process_file)
        self._require_same_saes(checkpoint, state["saes"])
        if state.get("machine", self._machine) != self._machine:  # checkpoints of older versions do not say
            _log.warning(
                "%s was written on %s, and this is %s: the run is continued, but not bit for bit, since sums round "
                "differently.",
                checkpoint,
                state["machine"],
                self._machine,
            )
        for name, trainee in self.trainees.items():
            trainee.load_state_dict(state["saes"][name])
        self.stream.load_state_dict(state["stream"])
        restore_random_state(state["random"], self.args.device)
        self._tr_loss.copy_(state["loss_since_log"])
        self._total_loss_scalar = state["loss_before"]
        self._globalstep_last_logged = state["logged_at"]
        self._initial_global_step = 0
        self._seconds = state["seconds"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train, unless the checkpoint is of a finished run: transformers would take one more step.

        A new run also rewinds the stream, whatever was read or loaded before.
        """
        if kwargs["resume_from_checkpoint"] is None:
            self.stream.rewind()
        else:  # save and log at this run's intervals, not at those of the checkpoint
            self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        self._load_rng_state(kwargs["resume_from_checkpoint"])
        self.control.should_training_stop = True

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """End the run, with speeds and mean loss over all of it, including the part before it was resumed."""
        return super()._finalize_training(trial, num_train_samples, time.time() - self.seconds)

    def _require_same_saes(self, checkpoint: str, saved: Mapping[str, Any]) -> None:
        if set(saved) != set(self.trainees):
            raise CheckpointError(
                f"{checkpoint} holds the SAEs {', '.join(map(repr, saved))}, and this run trains "
                f"{', '.join(map(repr, self.trainees))}: resume with the same SAEs."
            )
