"""`hf-gated-sae train`: train SAEs on a model and a text, as one YAML file says."""

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
from .output import AsJson, Output, Quiet
from .tables import facts_grid

if TYPE_CHECKING:
    from ..training.run import RunConfig


class _WithSettings(Command):
    """Lists, below its own options, the settings of a run, each of which is a flag."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        from .training.settings import show_settings  # here, so that nothing else waits for torch

        show_settings(Console())


@app.command(cls=_WithSettings, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in output_dir.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and write nothing.")] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="With --dry-run: load and run nothing, estimate.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="Recipe that everything else is laid over.", autocompletion=complete.presets)
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="Describe the presets, and stop.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train SAEs of any architecture at any site of a causal LM, as a YAML file says.

    Every setting of the file is also a flag, --training.learning_rate 1e-4, which comes before the file, as the file
    comes before its preset. The SAEs are left in output_dir, beside a run.yaml that names the commits of model and
    data and trains the same again.
    """
    run: RunConfig | None = None
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the first one speaks
    out = Output(quiet, as_json) if first else Output(quiet=True, silent=True)
    with interruptible(lambda: "" if run is None or dry_run else _how_to_go_on(run)):
        from ..training.run import read_flags, read_run  # here, so that --help does not wait for torch
        from .training.settings import presets_document, show_presets

        if presets:
            show_presets(out.results)
            out.document(presets_document())
            return
        if no_measure and not dry_run:
            raise InputError("--no-measure says how a --dry-run is done; pass both.")
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


def _how_to_go_on(run: RunConfig) -> str:
    """Return the sentence that says what an interrupted run has left."""
    from ..training.checkpoints import checkpoints

    if not checkpoints(Path(run.output_dir)):
        return "There is no checkpoint yet."
    return "Go on from the latest checkpoint with --resume."


def _estimate(out: Output, run: RunConfig, *, measure: bool) -> None:
    """Print what a run will cost."""
    from psutil import Process

    from ..training.run import estimate, measured
    from .training.settings import estimate_document, show_estimate

    with out.notes.status("measuring" if measure else "estimating"), out.bars():
        # A run imports as much before it begins as this command has.
        found = measured(run, before=time.time() - Process().create_time()) if measure else estimate(run)
    show_estimate(out.results, found)
    out.document(estimate_document(found))


def _train(out: Output, run: RunConfig, resume: bool) -> None:
    """Train, leave the SAEs, and say where they are and how they did."""
    from ..modeling.transformers_settings import without_bars
    from ..publishing.facts import read_facts
    from ..publishing.trained import leave
    from ..training.run import Run
    from .training.live_progress import LiveProgress

    with out.notes.status("loading"), without_bars():
        ready = Run.prepare(run, resume=resume)
    out.notes.print(facts_grid(ready.facts()))
    with LiveProgress(out.notes) as progress:
        ready.train([progress], quiet=True)
    if not ready.parts.arguments.should_save:
        return
    folders = leave(ready)
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
