"""`hf-gated-sae train`: train SAEs on a model and a text, configured by a YAML file."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import InputError, did_you_mean
from . import complete
from .app import Command, app, interruptible
from .console_output import AsJson, Output, Quiet
from .tables import facts_grid

if TYPE_CHECKING:
    from ..training.run import RunConfig


class _WithSettings(Command):
    """A command whose help also lists the settings of a run, each of which is a flag."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        from .training.settings import show_settings  # here, because it imports torch

        show_settings(Console())


@app.command(cls=_WithSettings, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the latest checkpoint in output_dir.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost of the run, and write nothing.")] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="With --dry-run: estimate, without loading or running anything.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="Preset, which all other settings override.", autocompletion=complete.presets)
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="Describe the presets and exit.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train SAEs of any architecture at any site of a causal LM, configured by a YAML file.

    Every setting of the file is also a flag, such as --training.learning_rate 1e-4. Flags override the file, and the
    file overrides its preset. The SAEs are written to output_dir, with a run.yaml that pins the commits of model and
    data and repeats the run.
    """
    run: RunConfig | None = None
    first = os.environ.get("RANK", "0") == "0"  # only the first of several processes prints
    out = Output(quiet, as_json) if first else Output(quiet=True, silent=True)
    with interruptible(lambda: "" if run is None or dry_run else _after_interruption(run)):
        from ..training.run import read_flags, read_run  # here, so that --help does not wait for torch
        from .training.settings import presets_document, show_presets

        if presets:
            show_presets(out.results)
            out.document(presets_document())
            return
        if no_measure and not dry_run:
            raise InputError("--no-measure only applies to --dry-run; pass both.")
        if config is None and preset is None and not context.args:
            raise InputError("Nothing to train: pass --config run.yaml, or the settings as flags (see --help).")
        _require_known(context)
        run = read_run(config, read_flags(context.args) | ({} if preset is None else {"preset": preset}))
        if dry_run:
            _estimate(out, run, measure=not no_measure)
        else:
            _train(out, run, resume)


def _require_known(context: typer.Context) -> None:
    """Raise for a word that is neither an option of the command nor a setting of a run."""
    from ..training.run import RunConfig

    options = [option for each in context.command.params for option in each.opts]
    known = [*options, *(f"--{each.name}" for each in fields(RunConfig))]
    for word in context.args:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in known:
            raise InputError(f"Unknown option {name}.{did_you_mean(name, known) or ' See --help.'}")


def _after_interruption(run: RunConfig) -> str:
    """Return the message after Ctrl-C: how to resume the run."""
    from ..training.checkpoints import checkpoints

    if not checkpoints(Path(run.output_dir)):
        return "There is no checkpoint yet."
    return "Resume from the latest checkpoint with --resume."


def _estimate(out: Output, run: RunConfig, *, measure: bool) -> None:
    """Print the cost of a run."""
    from psutil import Process

    from ..training.run import estimate, measured
    from .training.settings import estimate_document, show_estimate

    with out.notes.status("measuring" if measure else "estimating"), out.bars():
        # A run takes the same time for imports as this command did.
        found = measured(run, before=time.time() - Process().create_time()) if measure else estimate(run)
    show_estimate(out.results, found)
    out.document(estimate_document(found))


def _train(out: Output, run: RunConfig, resume: bool) -> None:
    """Train, save the SAEs with their cards, and print their folders and metrics."""
    from ..modeling.transformers_settings import without_bars
    from ..publishing.facts import read_facts
    from ..publishing.trained import save_trained
    from ..training.run import Run
    from .training.live_progress import LiveProgress

    with out.notes.status("loading"), without_bars():
        ready = Run.prepare(run, resume=resume)
    out.notes.print(facts_grid(ready.facts()))
    with LiveProgress(out.notes) as progress:
        ready.train([progress], quiet=True)
    if not ready.parts.arguments.should_save:
        return
    folders = save_trained(ready)
    for name, folder in folders.items():
        out.results.print(
            f"[bold]{escape(name or 'SAE')}[/] in {escape(str(folder))}", highlight=False, soft_wrap=True
        )
    facts = {name: read_facts(folder) for name, folder in folders.items()}
    out.document(
        {
            name or "SAE": {"folder": folder, "metrics": facts[name].metrics, "curve": facts[name].curve}
            for name, folder in folders.items()
        }
    )
