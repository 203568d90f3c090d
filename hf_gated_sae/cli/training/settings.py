"""Tables of `hf-gated-sae train`: settings, presets, and the cost of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

if TYPE_CHECKING:
    from ...training.run import Estimate

OF_TRANSFORMERS = (
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "gradient_accumulation_steps"),
    *("bf16", "fp16", "use_cpu", "logging_steps", "report_to", "save_steps", "save_total_limit"),
)
"""Arguments of transformers that the help lists."""


def attributes(cls: type) -> dict[str, str]:
    """Return the description of each attribute in a class's docstring, as one line."""
    text = inspect.getdoc(cls) or ""
    part = re.search(r"^Attributes:\n((?:(?: {4}.*)?\n?)*)", text, flags=re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", part[1] if part else "", flags=re.MULTILINE)
    return {name: " ".join(description.split()).replace("`", "") for name, description in entries}


def show_settings(console: Console) -> None:
    """Print every setting, section by section."""
    from ...training.run import DataSettings, ModelSettings, RunConfig, SAESettings

    sections = {"": RunConfig, "model.": ModelSettings, "sae.": SAESettings, "data.": DataSettings}
    for prefix, cls in sections.items():
        described = attributes(cls)
        rows = {
            f"--{prefix}{each.name}": (described.get(each.name, ""), _default(each))
            for each in fields(cls)
            if not each.metadata and each.name not in ("model", "data", "sae", "saes", "training", "preset")
        }
        _panel(console, prefix[:-1] or "run", (inspect.getdoc(cls) or "").splitlines()[0], rows)
    more = (
        "--saes.NAME.d_sae etc.: several SAEs by name, whose settings override those of sae. --sae.k, --sae.bandwidth "
        "etc.: further keys of the architecture's configuration."
    )
    console.print(Padding(more, (0, 2)), highlight=False)
    _show_training(console)


def _show_training(console: Console) -> None:
    """Print the trainer's arguments: its own, and the more important ones of transformers."""
    from transformers import TrainingArguments

    from ...training import SAETrainingArguments
    from ...training.run.assembly import ELSEWHERE

    own = {each.name for each in fields(SAETrainingArguments)} - {each.name for each in fields(TrainingArguments)}
    described = {**_documented_arguments(TrainingArguments), **attributes(SAETrainingArguments)}
    by_name: dict[str, Field[Any]] = {each.name: each for each in fields(SAETrainingArguments)}
    listed = [name for name in (*OF_TRANSFORMERS, *by_name) if name in own or name in OF_TRANSFORMERS]
    rows = {
        f"--training.{name}": (described.get(name, ""), _default(by_name[name]))
        for name in dict.fromkeys(listed)
        if name not in ELSEWHERE
    }
    _panel(console, "training", "Training arguments. For numbers of steps, 5% means 5% of max_steps.", rows)
    others = "--training also accepts every other argument of transformers.TrainingArguments that applies to SAEs."
    console.print(Padding(others, (0, 2)), highlight=False)


def show_presets(console: Console) -> None:
    """Print every preset: description, source and units."""
    from ...training.presets import presets

    for name, preset in presets.items():
        text = f"{preset.description}\n[bold]source[/] {escape(preset.source)}\n[bold]units[/] {escape(preset.units)}"
        console.print(Panel(text, title=name, title_align="left", border_style="dim"), highlight=False)


def presets_document() -> dict[str, Any]:
    """Return every preset as plain data, by name."""
    from ...training.presets import presets

    return {
        name: {
            "description": preset.description,
            "source": preset.source,
            "units": preset.units,
            "settings": preset.settings,
        }
        for name, preset in presets.items()
    }


def estimate_document(found: Estimate) -> dict[str, Any]:
    """Return the cost of a run as plain data: bytes, seconds, tokens and floating-point operations."""
    sums = {"total": found.total, "checkpoint": found.checkpoint, "operations": found.operations, "time": found.time}
    return {**{each.name: getattr(found, each.name) for each in fields(found)}, **sums}


def show_estimate(console: Console, found: Estimate) -> None:
    """Print the cost of a run."""
    for title, rows in found.tables().items():
        table = Table(title=title, title_justify="left", show_header=False, pad_edge=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold", style="dim")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table, highlight=False)
        console.print()


def _panel(console: Console, title: str, introduction: str, rows: Mapping[str, tuple[str, str]]) -> None:
    """Print flags with their descriptions and defaults."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for flag, (description, default) in rows.items():
        table.add_row(flag, f"{escape(description)} [dim]\\[{escape(default)}][/]" if default else escape(description))
    content = Group(f"{escape(introduction)}\n", table)
    console.print(Panel(content, title=title, title_align="left", border_style="dim"), highlight=False)


def _default(each: Field[Any]) -> str:
    """Return the default of a setting in YAML's spelling; empty for None, an empty mapping, or no default."""
    from ...training.run.assembly import RUN_DEFAULTS

    value = each.default if each.default_factory is MISSING else each.default_factory()
    value = RUN_DEFAULTS["training"].get(each.name, value)
    if value is MISSING or value in (None, {}):
        return ""
    value = getattr(value, "value", value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _documented_arguments(cls: type) -> dict[str, str]:
    """Return the first sentence of each argument's description in a docstring of transformers' style."""
    text = inspect.getdoc(cls) or ""
    found = re.findall(r"^ +(\w+) \(.*\):\n +((?:.|\n)+?)(?:\.\s|\n\n|\n +\w+ \()", text, flags=re.MULTILINE)
    return {name: " ".join(re.sub(r"\[`~?|`\]?", "", sentence).split()) + "." for name, sentence in found}
