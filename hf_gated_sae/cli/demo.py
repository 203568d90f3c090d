"""`hf-gated-sae demo`: an SAE changes what a language model writes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .app import app

if TYPE_CHECKING:
    from ..demo.run import DemoReport


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Causal LM: Hub id or folder. Default: the bundled one.")] = None,
    sae: Annotated[str | None, typer.Option(help="SAE: Hub id or folder. Default: the bundled ones.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the SAE inside --sae.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure on. Default: held-out Python standard library.")
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
) -> None:
    """Splice, ablate, steer and publish: load an SAE, and watch it change what a language model writes."""
    from ..demo.effects import SteeringPlan  # here, so that --help does not wait for torch
    from ..demo.plot import draw
    from ..demo.run import DemoPlan, run_demo

    start = time.perf_counter()
    console = Console()
    folder = out or Path(tempfile.mkdtemp(prefix="hf-gated-sae-"))
    plan = DemoPlan(model, sae, subfolder, text, concept, latent, folder, steering=SteeringPlan(strength=strength))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        report = run_demo(
            plan, lambda step, number, total: bar.update(task, description=step, completed=number, total=total)
        )
    console.print(f"[bold]model[/] {escape(report.model)}\n[bold]SAE[/]   {escape(report.sae)}")
    console.print(_fidelity(report))
    console.print(_ablation(report))
    _steering(console, report)
    console.print(
        f"Published to [bold]{escape(str(report.published))}[/] ({', '.join(report.files)}) and loaded back: "
        + ("every tensor identical." if report.identical else "[red]tensors differ![/]")
    )
    if plot is not None:
        draw(report, plot)
        console.print(f"Plot written to {escape(str(plot))}")
    console.print(f"[dim]{time.perf_counter() - start:.0f} s[/]")


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
        f"mean over {len(effect.continuations)} prompts; shown is the one that changed most",
        expand=True,
    )
    table.add_column(f"before: {shown.share_before:.0%} {target.name}", ratio=1)
    table.add_column(f"after: {shown.share_after:.0%} {target.name}", ratio=1)
    table.add_row(escape(shown.before), escape(shown.after))
    console.print(table)
