"""`hf-gated-sae demo`: splice, ablate and steer with an SAE in a language model, and publish it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..errors import InputError
from .app import Command, app, interruptible
from .argument_checks import modification_time, require_writable
from .console_output import AsJson, Output, Quiet

if TYPE_CHECKING:
    from ..demo.demo_run import DemoReport


@app.command(cls=Command)
def demo(
    model: Annotated[str | None, typer.Option(help="Causal LM: Hub id or folder. Default: the bundled one.")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE: Hub id or folder. Default: the bundled ones.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the SAE inside --sae.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to evaluate on. Default: held-out Python standard library.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to evaluate on. Default: 24,576; with over 20M parameters, 4,096."),
    ] = None,
    concept: Annotated[str | None, typer.Option(help="Concept to show, such as comment or docstring.")] = None,
    latent: Annotated[
        int | None, typer.Option(help="Show this latent instead of one with a measured meaning.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Steering strength in units of the latent's maximum. Default: chosen.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to publish into. Default: a new temporary one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the effect into this PNG (needs matplotlib).")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Splice, ablate, steer and publish: load an SAE, and see how it changes the output of a language model."""
    output, before = Output(quiet, as_json), modification_time(out)
    with interruptible(lambda: _after_interruption(out, is_new=modification_time(out) != before)):
        if out is not None:
            require_writable("--out", out)
        if plot is not None:
            _require_plot(plot)
        # With active waiting, idle threads of torch occupy cores: on a busy machine, generation takes several times as
        # long. torch reads this variable when it is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from ..demo.demo_run import DemoPlan, run_demo
        from ..demo.plot import draw  # here, so that --help does not wait for torch

        start = time.perf_counter()
        # Raises for arguments that contradict each other, before the folder is created.
        plan = DemoPlan(model, sae, subfolder, text, concept, latent, strength, tokens)
        with _folder(out) as folder, output.bars(), output.steps() as progress:
            report = run_demo(replace(plan, out=folder), progress)
        if plot is not None:
            draw(report, plot)
    output.document({**record(report), "plot": plot, "seconds": time.perf_counter() - start})
    _show(output.results, report)
    if plot is not None:
        output.show(f"Plot written to {escape(str(plot))}")
    output.note(f"[dim]{time.perf_counter() - start:.0f} s[/]")


def _after_interruption(out: Path | None, *, is_new: bool) -> str:
    """Return the message after Ctrl-C: what was written, and how to continue."""
    if is_new:
        return f"The SAE was published to {out} before that."
    where = "Nothing was published" + (f" to {out}" if out else "")
    return f"{where}; the same command starts again, and --tokens 1024 makes it shorter."


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Context of the folder to publish into; an empty temporary one is removed afterwards."""
    if out is not None:
        yield out
        return
    made = Path(tempfile.mkdtemp(prefix="hf-gated-sae-"))
    try:
        yield made
    finally:
        if not any(made.iterdir()):
            made.rmdir()


def _require_plot(plot: Path) -> None:
    """Raise unless a plot can be drawn and written to a file.

    Raises:
        InputError: with the reason.
    """
    if find_spec("matplotlib") is None:
        raise InputError("Plots need matplotlib: pip install 'hf-gated-sae[plot]'.")
    if plot.is_dir():
        raise InputError(f"--plot {plot} is a folder; expected a file, such as {plot / 'demo.png'}.")
    require_writable("--plot", plot.parent)


def record(report: DemoReport) -> dict[str, Any]:
    """Return the measurements, without those of each latent, for the JSON document."""
    fidelity, steering, target = report.fidelity.to_dict(per_latent=False), report.steering, report.target
    per_latent = ("density", "max_activation", "mean_activation")
    return {
        "model": report.model,
        "sae": report.sae,
        "fidelity": {name: value for name, value in fidelity.items() if name not in per_latent},
        "target": {"latent": target.latent, "name": target.name, "evidence": target.evidence},
        "ablation": report.ablation,
        "steering": {
            "strength": steering.strength,
            "share_before": steering.share_before,
            "share_after": steering.share_after,
            "continuations": steering.continuations,
        },
        "published": report.published,
        "files": report.files,
        "identical": report.identical,
    }


def _show(console: Console, report: DemoReport) -> None:
    """Print the measurements."""
    console.print(f"[bold]model[/] {escape(report.model)}\n[bold]SAE[/]   {escape(report.sae)}")
    console.print(_fidelity(report))
    console.print(_ablation(report))
    _steering(console, report)
    console.print(
        f"Published to [bold]{escape(str(report.published))}[/] ({', '.join(report.files)}) and loaded back: "
        + ("every tensor identical." if report.identical else "[red]tensors differ![/]")
    )


def _fidelity(report: DemoReport) -> Table:
    """Return the table of losses and metrics of the splice."""
    found, metrics = report.fidelity, report.fidelity.metrics
    table = Table(
        title="Splice: the site replaced by its reconstruction",
        caption=f"losses in nats per token, over {found.tokens:,} tokens",
    )
    for name in ("clean", "spliced", "zero-ablated", "recovered", "L0", "FVU", "gamma", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(
        *(f"{loss:.3f}" for loss in (found.loss_clean, found.loss_spliced, found.loss_zero_ablated)),
        f"{found.loss_recovered:.1%}",
        f"{metrics.l0:.1f}",
        f"{metrics.fvu:.3f}",
        f"{metrics.relative_reconstruction_bias:.3f}",
        f"{metrics.dead_fraction:.1%}",
    )
    return table


def _ablation(report: DemoReport) -> Table:
    """Return the table of losses with the latent ablated."""
    effect, target = report.ablation, report.target
    table = Table(title=f"Ablate latent {target.latent} ({target.name})", caption=target.evidence)
    for name in ("tokens", "number", "loss clean", "loss ablated", "change"):
        table.add_column(name, justify="left" if name == "tokens" else "right")
    rows = (
        (f"inside: {target.name}", effect.inside_tokens, effect.inside_clean, effect.inside_ablated),
        ("outside: all others", effect.outside_tokens, effect.outside_clean, effect.outside_ablated),
    )
    for where, number, clean, ablated in rows:
        table.add_row(where, f"{number:,}", f"{clean:.3f}", f"{ablated:.3f}", f"{ablated - clean:+.4f}")
    return table


def _steering(console: Console, report: DemoReport) -> None:
    """Print the clearest pair of continuations side by side, and the shares over all prompts."""
    effect, target, shown = report.steering, report.target, report.steering.clearest
    console.print(Panel(escape(shown.prompt), title="prompt", title_align="left", border_style="dim"))
    table = Table(
        title=f"Steer with latent {target.latent}, {effect.strength:g} x its maximum, on generated tokens",
        caption=f"{target.name}: {effect.share_before:.0%} before, {effect.share_after:.0%} after, "
        f"mean over {len(effect.continuations)} prompts; shown: the prompt with the largest change",
        expand=True,
    )
    table.add_column(f"before: {shown.share_before:.0%} {target.name}", ratio=1)
    table.add_column(f"after: {shown.share_after:.0%} {target.name}", ratio=1)
    table.add_row(escape(shown.before), escape(shown.after))
    console.print(table)
    if effect.share_after <= effect.share_before:
        console.print(
            f"Steering changed the output, but did not raise the share of {target.name}: this latent detects it and "
            "does not cause it. Try another with --latent or --concept, or another --strength.",
            highlight=False,
            markup=False,
        )
