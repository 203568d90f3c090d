"""A plot of the demo's measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from .demo_run import DemoReport

CLEAN, CHANGED, WORST = "#4c78a8", "#f58518", "#bab0ac"


def draw(report: DemoReport, path: Path) -> None:
    """Draw losses, the ablation and the steering side by side.

    Args:
        report: the measurements.
        path: PNG file to write.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # an optional dependency
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Plots need matplotlib: pip install 'hf-gated-sae[plot]'.") from error
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    found, ablation, steering, target = report.fidelity, report.ablation, report.steering, report.target
    _bars(
        left,
        {"clean": found.loss_clean, "spliced": found.loss_spliced, "zeros": found.loss_zero_ablated},
        [CLEAN, CHANGED, WORST],
        f"Splice: {found.loss_recovered:.1%} of the loss\nrecovered at L0 {found.metrics.l0:.0f}",
        "loss (nats per token)",
    )
    _bars(
        middle,
        {
            f"inside\n({target.name})": ablation.inside_ablated - ablation.inside_clean,
            "outside\n(all others)": ablation.outside_ablated - ablation.outside_clean,
        },
        [CHANGED, CLEAN],
        f"Ablate latent {target.latent}:\nchange of the loss",
        "nats per token",
    )
    _bars(
        right,
        {"before": 100 * steering.share_before, "after": 100 * steering.share_after},
        [CLEAN, CHANGED],
        f"Steer with latent {target.latent}:\nshare of {target.name} in continuations",
        f"% of {len(steering.continuations)} continuations",
    )
    figure.savefig(path, dpi=110)


def _bars(axes: Any, values: dict[str, float], colours: list[str], title: str, unit: str) -> None:
    """Draw labelled bars."""
    bars = axes.bar(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit, fontsize=9)
    axes.margins(y=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
