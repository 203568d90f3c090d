"""Executing a training run, started or resumed; its settings are stored as `run.yaml` with the results."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from ...errors import CheckpointError, InputError, SAEError
from ...modeling import SAEModel
from ...storage.atomic_write import written_together
from ..arguments import ARGUMENTS_FILE
from ..checkpoints import checkpoints, newest_whole
from ..memory import TrainingMemory, require_room
from ..processes import Processes
from ..progress_bar import TrainingProgress
from ..run_facts import FACTS_FILE
from ..sharding import whole_config
from ..streams import HeldBack, ModelActivations, TextTokens
from ..trainer import SAETrainer
from .assembly import arguments, assemble, plain
from .run_config import RunConfig
from .run_parts import Parts, build
from .run_text import open_other, open_tokens
from .strict_yaml import leaves, read_yaml

RUN_FILE = "run.yaml"
LOCK_FILE = ".running"
RESULTS = ("checkpoint-*", "config.json", "*.safetensors", "README.md", ARGUMENTS_FILE, FACTS_FILE)
"""Files that a run overwrites or removes; a new run is refused if its folder holds any that it did not write."""
CHANGEABLE = ("logging", "save_", "report_to", "run_name", "project", "disable_tqdm", "log_level", "use_cpu")
"""Prefixes of the arguments that a resumed run may change; all others determine the weights."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        parts: model, data, SAEs and arguments.
        checkpoint: folder to resume from; None to start from the beginning.
        resumed: whether the run was started before.
    """

    parts: Parts
    checkpoint: Path | None = None
    resumed: bool = False

    @classmethod
    def prepare(cls, config: RunConfig, *, resume: bool = False) -> Run:
        """Load and check everything that the run needs; nothing is written.

        Args:
            config: the run.
            resume: continue the run in `output_dir`.

        Raises:
            CheckpointError: if none of the run's checkpoints is whole.
            InputError: if `output_dir` holds a run and `resume` is False; if it holds none, or another one, and
                `resume` is True; or if it cannot be written to.
            TrainingError: if memory cannot hold the SAEs and the shuffle buffer.
            SiteError: if the model does not have a site.
        """
        folder = Path(config.output_dir)
        _require_writable(folder)
        stored = folder / RUN_FILE
        if not resume:
            _require_free(config)
            return cls(_require_memory(build(config)))
        if not stored.exists():
            raise InputError(f"There is no run in {folder} to resume (no {RUN_FILE}); start it without --resume.")
        same = _same_run(config, assemble(read_yaml(stored)))
        checkpoint = newest_whole(folder, Processes.all())
        if checkpoint is None and checkpoints(folder):
            raise CheckpointError(
                f"None of the checkpoints in {folder} is whole, and a run from the beginning would replace them: "
                f"remove them and {RUN_FILE} to start again, or choose another output_dir."
            )
        return cls(_require_memory(build(same)), checkpoint, resumed=True)

    @property
    def config(self) -> RunConfig:
        """The run's settings, with revisions resolved to commits."""
        return self.parts.config

    @property
    def saes(self) -> Mapping[str, SAEModel]:
        """The SAEs, by the name of their section; if processes share them, this process's parts."""
        return self.parts.saes

    def trained(self, name: str) -> SAEModel:
        """Return an SAE of the finished run; if processes share it, it is loaded from disk."""
        if self.parts.arguments.latent_parallel == 1:
            return self.saes[name]
        sae: SAEModel = SAEModel.from_pretrained(self.folder(name))
        return sae

    def held_out(self, text: str, split: str = "test") -> TextTokens:
        """Return tokens of other text, in sequences made in the same way as the run's own.

        Args:
            text: file, folder or Hub id of a data set; the run's own data set is read in its configuration and commit.
            split: of a data set.

        Raises:
            InputError: if it is empty or cannot be opened, or if the run reads activations on disk.
            MissingFileError: if a path does not exist.
        """
        parts, data = self.parts, self.config.data
        if parts.model is None or parts.tokenizer is None:
            raise InputError("The run reads activations from disk, without a model that could read other text.")
        found = open_tokens(data, parts.tokenizer, parts.model, open_other(data, text, split))
        next(iter(found))  # raises now if the text is empty
        return found

    def folder(self, name: str) -> Path:
        """Return the folder of an SAE: `output_dir` itself, or, with several SAEs, a folder of its name in it."""
        return Path(self.config.output_dir, name)

    def facts(self) -> dict[str, str]:
        """Return a summary of the run for display, by label."""
        config, args = self.config, self.parts.arguments
        saes = {name or "SAE": _described(sae) for name, sae in self.saes.items()}
        start = f"from {self.checkpoint.name}" if self.checkpoint else "from the beginning"
        return {
            **({"model": self._model_fact()} if config.model else {}),
            "data": _at(config.data.name, config.data.revision),
            **saes,
            **self._held_out_fact(),
            "steps": f"{args.max_steps:,} of {args.activations_per_step:,} activations, {start}",
        }

    def _held_out_fact(self) -> dict[str, str]:
        stream, data = self.parts.stream, self.config.data
        if not isinstance(stream, ModelActivations) or not data.held_out_tokens:
            return {}
        if not isinstance(stream.tokens, HeldBack):
            return {"held out": "nothing: the text is too short. Give other text with --data.held_out"}
        source = data.held_out or "the first sequences of the data"
        times = len(self.parts.arguments.evaluation_steps)
        return {"held out": f"{data.held_out_tokens:,} tokens, {source}, measured {times} times"}

    def _model_fact(self) -> str:
        config, model = self.config.model, self.parts.model
        assert config is not None
        at = _at(config.name, config.revision)
        if model is None:
            return at
        remark = f" ({self.parts.dtype_remark})" if self.parts.dtype_remark else ""
        return f"{at}, in {str(model.dtype).removeprefix('torch.')}{remark}"

    def train(self, callbacks: list[TrainerCallback] | None = None, *, quiet: bool = False) -> TrainOutput:
        """Train; checkpoints, `run.yaml` and the trained SAEs are written to `output_dir`.

        Args:
            callbacks: further callbacks of the trainer.
            quiet: show neither the trainer's progress bar nor its log lines.

        Raises:
            InputError: if the trainer cannot be set up, or another process is training in `output_dir`.
            SAEError: as for `SAETrainer.train`.
        """
        with _locked(Path(self.config.output_dir), writes=self.parts.arguments.should_save):
            if not self.resumed and self.parts.arguments.should_save:
                _require_free(self.config)  # another run may have finished while the model was loaded
            trainer = self._trainer(callbacks)
            for loud in (PrinterCallback, TrainingProgress) if quiet else ():
                trainer.remove_callback(loud)
            trainer.add_callback(_WritesRun(self.config))
            return trainer.train(resume_from_checkpoint=self.checkpoint)

    def _trainer(self, callbacks: list[TrainerCallback] | None) -> SAETrainer:
        alone, parts = self.saes.get(""), self.parts
        model = self.saes if alone is None else alone
        try:
            return SAETrainer(model, parts.arguments, parts.stream, callbacks, grid=parts.grid)
        except SAEError:
            raise
        except (
            ValueError,
            OSError,
            ImportError,
            RuntimeError,
        ) as error:  # settings that transformers checks only here
            raise InputError(f"The trainer cannot be set up: {' '.join(str(error).split())}") from error


class _WritesRun(TrainerCallback):
    """Writes `run.yaml` after the first step, so that a run that fails before leaves no file in the folder."""

    def __init__(self, config: RunConfig) -> None:
        self.config: RunConfig | None = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.config is not None and state.is_world_process_zero:
            write_run(self.config)
        self.config = None


def _require_writable(folder: Path) -> None:
    """Raise unless a folder exists or can be created, and can be written to; no file is left in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir is {folder}, which is a file; expected a folder, or a path that does not exist.")
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK) or not _takes_files(nearest):
        raise InputError(f"output_dir is {folder}, and {nearest.absolute()} cannot be written to.")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be created in a folder; permissions do not show a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _require_free(config: RunConfig) -> None:
    """Raise if `output_dir` holds a run, or other files that this run would replace."""
    folder = Path(config.output_dir)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder} already holds a run ({RUN_FILE}): use --resume, or choose another folder.")
    for target in dict.fromkeys([folder, *(folder / name for name in config.named)]):
        found = next((path for pattern in RESULTS for path in sorted(target.glob(pattern))), None)
        if found is not None:
            raise InputError(
                f"output_dir {folder} holds {found.relative_to(folder)} but no {RUN_FILE}: the file was not written "
                "by a run and would be replaced. Choose another folder."
            )


def _require_memory(parts: Parts) -> Parts:
    """Return the parts of a run unchanged.

    Raises:
        TrainingError: if memory cannot hold the SAEs and the shuffle buffer.
    """
    if isinstance(parts.stream, ModelActivations):
        buffer = f"data.buffer_size={parts.stream.buffer_size}"
        memory = TrainingMemory.of(parts.saes.values())
        require_room(memory, {buffer: parts.stream.buffer_bytes}, parts.arguments.device)
    return parts


@contextmanager
def _locked(folder: Path, *, writes: bool) -> Iterator[None]:
    """Lock a folder against other runs; the operating system releases the lock when this process ends.

    Args:
        folder: the run's `output_dir`; removed afterwards if it was created here and is empty.
        writes: whether this process is the one of several that writes.

    Raises:
        InputError: if another process holds the lock.
    """
    if not writes:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another process is training in {folder}: wait until it has ended, or choose another folder."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # while the lock is held: afterwards the file may belong to another run
            (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def write_run(config: RunConfig) -> Path:
    """Write a run, with its commits, as a YAML file with which it can be repeated; return the path."""
    folder = Path(config.output_dir)
    with written_together(folder) as staging:
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
        (staging / RUN_FILE).write_text(text, encoding="utf-8")
    return folder / RUN_FILE


def _same_run(config: RunConfig, stored: RunConfig) -> RunConfig:
    """Return a run with the commits and chosen sizes of the stored one.

    Raises:
        InputError: if they differ in a setting that determines the weights.
    """
    model, data = config.model, config.data
    if model is not None and stored.model is not None:
        revision = stored.model.revision if model.revision is None else model.revision
        dtype = stored.model.dtype if model.dtype == "auto" else model.dtype
        model = dataclasses.replace(model, revision=revision, dtype=dtype)
    # Settings without a value got one when the run started; runs of older versions held no text back.
    stored_data = dataclasses.replace(stored.data, held_out_tokens=stored.data.held_out_tokens or 0)
    stored = dataclasses.replace(stored, data=stored_data)
    chosen_at_start = ("revision", "sequences_per_batch", "buffer_size", "held_out_tokens")
    chosen = {name: getattr(stored_data, name) for name in chosen_at_start if getattr(data, name) is None}
    data = dataclasses.replace(data, **chosen)
    pinned = dataclasses.replace(config, model=model, data=data)
    changeable = (*CHANGEABLE, *arguments(config).changeable_on_resume)
    given, before = _determining_weights(pinned, changeable), _determining_weights(stored, changeable)
    different = [name for name in {**before, **given} if given.get(name) != before.get(name)]
    if different:
        name = different[0]
        others = ", ".join(different[1:])
        options = f"--config {Path(config.output_dir, RUN_FILE)}"
        steps = [pinned.training.get("max_steps"), stored.training.get("max_steps")]
        if "max_steps" in changeable and steps[0] != steps[1]:  # other steps may be given as shares of it
            options += f" --training.max_steps {steps[0]}"
        raise InputError(
            f"The run in {config.output_dir} has {name}: {before.get(name)}, but {given.get(name)} was given"
            f"{others and f'; {others} also differ'}. Resume it with its own settings: {options}."
        )
    return pinned


def _determining_weights(config: RunConfig, changeable: Iterable[str]) -> dict[str, Any]:
    """Return the settings that determine the weights, by key path.

    Args:
        config: the run.
        changeable: prefixes of the training arguments that do not.
    """
    ignored = (*(f"training.{name}" for name in changeable), "output_dir", "model.device", "license")
    return {name: value for name, value in leaves(plain(config)) if not name.startswith(ignored)}


def _at(name: str, revision: str | None) -> str:
    return f"{name} @ {revision}" if revision else name


def _described(sae: SAEModel) -> str:
    config = whole_config(sae)
    sites = " to ".join(dict.fromkeys((", ".join(config.sites_read), ", ".join(config.sites_written))))
    return f"{type(sae).__name__} at {sites}, {config.d_in} wide, {config.d_sae:,} latents"
