"""Carrying a run out: begun anew or resumed, with what it is written beside what it leaves."""

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
"""What a run writes over, or removes when there are too many: of somebody else's it must find none."""
MAY_CHANGE = ("logging", "save_", "report_to", "run_name", "project", "disable_tqdm", "log_level", "use_cpu")
"""How the arguments begin that a resumed run may have otherwise; all others decide the weights."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to be carried out.

    Attributes:
        parts: what it is made of.
        checkpoint: folder to go on from; None to begin.
        resumed: whether it has been begun before.
    """

    parts: Parts
    checkpoint: Path | None = None
    resumed: bool = False

    @classmethod
    def prepare(cls, config: RunConfig, *, resume: bool = False) -> Run:
        """Load and prove everything that the run needs; nothing is written.

        Args:
            config: the run.
            resume: go on with what is in `output_dir`.

        Raises:
            CheckpointError: if none of the checkpoints to go on from is whole.
            InputError: if `output_dir` holds a run and `resume` is False, or none or another one and it is True; or
                if nothing can be written there.
            TrainingError: if memory cannot hold what the run holds throughout.
            SiteError: if the model does not have a site.
        """
        folder = Path(config.output_dir)
        _require_writable(folder)
        stored = folder / RUN_FILE
        if not resume:
            _require_free(config)
            return cls(_fitting(build(config)))
        if not stored.exists():
            raise InputError(f"There is no run in {folder} to resume (no {RUN_FILE}); start it without --resume.")
        same = _same_run(config, assemble(read_yaml(stored)))
        checkpoint = newest_whole(folder, Processes.all())
        if checkpoint is None and checkpoints(folder):
            raise CheckpointError(
                f"None of the checkpoints in {folder} is whole, and from the beginning the run would replace them: "
                f"remove them and {RUN_FILE} to begin again, or choose another output_dir."
            )
        return cls(_fitting(build(same)), checkpoint, resumed=True)

    @property
    def config(self) -> RunConfig:
        """What it is, with the commits that it was resolved to."""
        return self.parts.config

    @property
    def saes(self) -> Mapping[str, SAEModel]:
        """The SAEs, by the name of their section; where processes share them, this process's parts."""
        return self.parts.saes

    def trained(self, name: str) -> SAEModel:
        """Return an SAE of the finished run: that on the disk where processes share it, and none holds it whole."""
        if self.parts.arguments.latent_parallel == 1:
            return self.saes[name]
        sae: SAEModel = SAEModel.from_pretrained(self.folder(name))
        return sae

    def held_out(self, text: str, split: str = "test") -> TextTokens:
        """Return tokens of other text, read and cut as the run's own are.

        Args:
            text: file, folder or data set's Hub id; of the run's own data set, its configuration and commit are read.
            split: of a data set.

        Raises:
            InputError: if it is empty or cannot be opened, or if the run reads activations on disk.
            MissingFileError: if a path is not there.
        """
        parts, data = self.parts, self.config.data
        if parts.model is None or parts.tokenizer is None:
            raise InputError("The run reads activations from disk, without a model that could read other text.")
        found = open_tokens(data, parts.tokenizer, parts.model, open_other(data, text, split))
        next(iter(found))  # which is refused now if there is nothing
        return found

    def folder(self, name: str) -> Path:
        """Return where an SAE is left: `output_dir` itself, or, of several, a folder of its name in it."""
        return Path(self.config.output_dir, name)

    def facts(self) -> dict[str, str]:
        """Return what is about to be trained, for people."""
        config, args = self.config, self.parts.arguments
        places = {name or "SAE": _described(sae) for name, sae in self.saes.items()}
        start = f"from {self.checkpoint.name}" if self.checkpoint else "from the beginning"
        return {
            **({"model": self._model_fact()} if config.model else {}),
            "data": _at(config.data.name, config.data.revision),
            **places,
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
            quiet: show neither the trainer's bar nor its lines.

        Raises:
            InputError: if the trainer cannot be set up, or another process is carrying out a run in `output_dir`.
            SAEError: what `SAETrainer.train` raises.
        """
        with _alone_in(Path(self.config.output_dir), writes=self.parts.arguments.should_save):
            if not self.resumed and self.parts.arguments.should_save:
                _require_free(self.config)  # another run may have come and gone while the model was loaded
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
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # what transformers refuses only now
            raise InputError(f"The trainer cannot be set up: {' '.join(str(error).split())}") from error


class _WritesRun(TrainerCallback):
    """Writes the run down after its first step: what fails before leaves nothing in the way of another attempt."""

    def __init__(self, config: RunConfig) -> None:
        self.config: RunConfig | None = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.config is not None and state.is_world_process_zero:
            write_run(self.config)
        self.config = None


def _require_writable(folder: Path) -> None:
    """Raise unless a folder is there, or can be made, and be written to; nothing is left there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir is {folder}, which is a file; expected a folder, or nothing yet.")
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK) or not _takes_files(nearest):
        raise InputError(f"output_dir is {folder}, and nothing can be written to {nearest.absolute()}.")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder; for a file system that cannot be written, permissions say nothing."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _require_free(config: RunConfig) -> None:
    """Raise if `output_dir` holds a run, or results of something else that this run would replace."""
    folder = Path(config.output_dir)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder} holds a run already ({RUN_FILE}): go on with --resume, or choose another.")
    for place in dict.fromkeys([folder, *(folder / name for name in config.named)]):
        found = next((path for pattern in RESULTS for path in sorted(place.glob(pattern))), None)
        if found is not None:
            raise InputError(
                f"output_dir is {folder}, where there is {found.relative_to(folder)} but no {RUN_FILE}: it is of "
                "something else and would be replaced. Choose another folder."
            )


def _fitting(parts: Parts) -> Parts:
    """Return the parts of a run.

    Raises:
        TrainingError: if memory cannot hold what they hold throughout.
    """
    if isinstance(parts.stream, ModelActivations):
        buffer = f"data.buffer_size={parts.stream.buffer_size}"
        memory = TrainingMemory.of(parts.saes.values())
        require_room(memory, {buffer: parts.stream.buffer_bytes}, parts.arguments.device)
    return parts


@contextmanager
def _alone_in(folder: Path, *, writes: bool) -> Iterator[None]:
    """Let no other run write into a folder; the system lets go of the lock however this process ends.

    Args:
        folder: the run's `output_dir`; one that is left empty is removed.
        writes: whether this process, of several, is the one that writes.

    Raises:
        InputError: if another process has it.
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
            f"Another process is carrying out a run in {folder}: wait for it, or choose another."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: later it might be another's
            (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def write_run(config: RunConfig) -> Path:
    """Write a run, with the commits that it was resolved to, as the YAML file that carries it out again."""
    folder = Path(config.output_dir)
    with written_together(folder) as staging:
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
        (staging / RUN_FILE).write_text(text, encoding="utf-8")
    return folder / RUN_FILE


def _same_run(config: RunConfig, stored: RunConfig) -> RunConfig:
    """Return a run with the commits of the stored one.

    Raises:
        InputError: if they differ in something that decides the weights.
    """
    model, data = config.model, config.data
    if model is not None and stored.model is not None:
        revision = stored.model.revision if model.revision is None else model.revision
        dtype = stored.model.dtype if model.dtype == "auto" else model.dtype
        model = dataclasses.replace(model, revision=revision, dtype=dtype)
    # What was left open was chosen when the run began; runs of older versions held no text back.
    began = dataclasses.replace(stored.data, held_out_tokens=stored.data.held_out_tokens or 0)
    stored = dataclasses.replace(stored, data=began)
    open_then = ("revision", "sequences_per_batch", "buffer_size", "held_out_tokens")
    chosen = {name: getattr(began, name) for name in open_then if getattr(data, name) is None}
    data = dataclasses.replace(data, **chosen)
    pinned = dataclasses.replace(config, model=model, data=data)
    free = (*MAY_CHANGE, *arguments(config).open_until_the_end)
    mine, theirs = _deciding(pinned, free), _deciding(stored, free)
    different = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        others = ", ".join(different[1:])
        begun = f"--config {Path(config.output_dir, RUN_FILE)}"
        steps = [pinned.training.get("max_steps"), stored.training.get("max_steps")]
        if "max_steps" in free and steps[0] != steps[1]:  # of which other steps may have been shares
            begun += f" --training.max_steps {steps[0]}"
        raise InputError(
            f"The run in {config.output_dir} has {name}: {theirs.get(name)}, and it is to go on with {mine.get(name)}"
            f"{others and f'; likewise {others}'}. Resume it as it was begun, with {begun}."
        )
    return pinned


def _deciding(config: RunConfig, free: Iterable[str]) -> dict[str, Any]:
    """Return the settings that decide the weights, by their place.

    Args:
        config: the run.
        free: how the arguments begin that do not.
    """
    ignored = (*(f"training.{name}" for name in free), "output_dir", "model.device", "license")
    return {name: value for name, value in leaves(plain(config)) if not name.startswith(ignored)}


def _at(name: str, revision: str | None) -> str:
    return f"{name} @ {revision}" if revision else name


def _described(sae: SAEModel) -> str:
    config = whole_config(sae)
    sites = " to ".join(dict.fromkeys((", ".join(config.sites_read), ", ".join(config.sites_written))))
    return f"{type(sae).__name__} at {sites}, {config.d_in} wide, {config.d_sae:,} latents"
