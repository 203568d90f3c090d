"""Tables that several subcommands print."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table


def facts_grid(facts: Mapping[str, str]) -> Table:
    """Return a grid with one row per name and value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, escape(value))
    return grid


def l0_text(l0: float, kind: str | None) -> str:
    """Return an L0, marked with ~ if it is the target of training and not measured.

    >>> l0_text(60.0, "target"), l0_text(82.0, "measured")
    ('~60', '82')
    """
    return f"{'~' if kind == 'target' else ''}{l0:g}"
