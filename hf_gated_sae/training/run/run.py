"""Carrying a run out: begun anew or resumed, with what it is written beside what it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from ...errors import InputError
from ...modeling import SAEModel
from ...modeling.saving import replaced_together
from ..checkpoints import newest_whole
from ..progress import TrainingProgress
from ..trainer import SAETrainer
from .assembly import assemble, plain
from .config import RunConfig
from .parts import Parts, build
from .reading import leaves, read_yaml

RUN_FILE = "run.yaml"
MAY_CHANGE = ("logging", "save_", "report_to", "run_name", "project", "disable_tqdm", "log_level", "use_cpu")
"""How the arguments begin that a resumed run may have otherwise; all others decide the weights."""


@dataclass(frozen=True)
class Run:
    """A run that is ready to be carried out.

    Attributes:
        parts: what it is made of.
        checkpoint: folder to go on from; None to begin.
    """

    parts: Parts
    checkpoint: Path | None = None

    @classmethod
    def prepare(cls, config: RunConfig, *, resume: bool = False) -> Run:
        """Load and prove everything that the run needs; nothing is written.

        Args:
            config: the run.
            resume: go on with what is in `output_dir`.

        Raises:
            InputError: if `output_dir` holds a run and `resume` is False, or none or another one and it is True.
            SiteError: if the model does not have a site.
        """
        folder = Path(config.output_dir)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir is {folder}, which is a file; expected a folder, or nothing yet.")
        stored = folder / RUN_FILE
        if not resume:
            if stored.exists():
                raise InputError(f"{folder} holds a run already ({RUN_FILE}): go on with --resume, or choose another.")
            return cls(build(config))
        if not stored.exists():
            raise InputError(f"There is no run in {folder} to resume (no {RUN_FILE}); start it without --resume.")
        parts = build(_same_run(config, assemble(read_yaml(stored))))
        return cls(parts, newest_whole(folder))

    @property
    def config(self) -> RunConfig:
        """What it is, with the commits that it was resolved to."""
        return self.parts.config

    @property
    def saes(self) -> Mapping[str, SAEModel]:
        """The SAEs, by the name of their section."""
        return self.parts.saes

    def trained(self, name: str) -> SAEModel:
        """Return an SAE of the finished run: that on the disk where processes share it, and none holds it whole."""
        if self.parts.arguments.latent_parallel == 1:
            return self.saes[name]
        sae: SAEModel = SAEModel.from_pretrained(self.folder(name))
        return sae

    def folder(self, name: str) -> Path:
        """Return where an SAE is left: `output_dir` itself, or, of several, a folder of its name in it."""
        return Path(self.config.output_dir, name)

    def facts(self) -> dict[str, str]:
        """Return what is about to be trained, for people."""
        config, args = self.config, self.parts.arguments
        places = {name or "SAE": _described(sae) for name, sae in self.saes.items()}
        start = f"from {self.checkpoint.name}" if self.checkpoint else "from the beginning"
        return {
            **({"model": _at(config.model.name, config.model.revision)} if config.model else {}),
            "data": _at(config.data.name, config.data.revision),
            **places,
            "steps": f"{args.max_steps:,} of {args.activations_per_step:,} activations, {start}",
        }

    def train(self, callbacks: list[TrainerCallback] | None = None, *, quiet: bool = False) -> TrainOutput:
        """Train; checkpoints, `run.yaml` and the trained SAEs are written to `output_dir`.

        Args:
            callbacks: further callbacks of the trainer.
            quiet: show neither the trainer's bar nor its lines.
        """
        alone = self.saes.get("")
        trainer = SAETrainer(
            self.saes if alone is None else alone, self.parts.arguments, self.parts.stream, callbacks=callbacks
        )
        for loud in (PrinterCallback, TrainingProgress) if quiet else ():
            trainer.remove_callback(loud)
        trainer.add_callback(_WritesRun(self.config))
        return trainer.train(resume_from_checkpoint=self.checkpoint)


class _WritesRun(TrainerCallback):
    """Writes the run down after its first step: what fails before leaves nothing in the way of another attempt."""

    def __init__(self, config: RunConfig) -> None:
        self.config: RunConfig | None = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.config is not None and state.is_world_process_zero:
            write_run(self.config)
        self.config = None


def write_run(config: RunConfig) -> Path:
    """Write a run, with the commits that it was resolved to, as the YAML file that carries it out again."""
    folder = Path(config.output_dir)
    with replaced_together(folder) as staging:
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
        (staging / RUN_FILE).write_text(text, encoding="utf-8")
    return folder / RUN_FILE


def _same_run(config: RunConfig, stored: RunConfig) -> RunConfig:
    """Return a run with the commits of the stored one.

    Raises:
        InputError: if they differ in something that decides the weights.
    """
    model, data = config.model, config.data
    if model is not None and model.revision is None and stored.model is not None:
        model = dataclasses.replace(model, revision=stored.model.revision)
    if data.revision is None:
        data = dataclasses.replace(data, revision=stored.data.revision)
    pinned = dataclasses.replace(config, model=model, data=data)
    mine, theirs = _deciding(pinned), _deciding(stored)
    different = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        others = f", and {', '.join(different[1:])}" if different[1:] else ""
        raise InputError(
            f"The run in {config.output_dir} has {name}: {theirs.get(name)}, and it is to go on with {mine.get(name)}"
            f"{others}. Resume it as it was begun, with --config {Path(config.output_dir, RUN_FILE)}."
        )
    return pinned


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the weights, by their place."""
    ignored = tuple(f"training.{name}" for name in MAY_CHANGE) + ("output_dir", "model.device")
    return {name: value for name, value in leaves(plain(config)) if not name.startswith(ignored)}


def _at(name: str, revision: str | None) -> str:
    return f"{name} @ {revision}" if revision else name


def _described(sae: SAEModel) -> str:
    config = sae.config
    sites = " to ".join(dict.fromkeys((", ".join(config.sites_read), ", ".join(config.sites_written))))
    return f"{type(sae).__name__} at {sites}, {config.d_in} wide, {config.d_sae:,} latents"
