"""How a training run is doing, in a terminal or in a file."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from ...training.progress import numbers

SHORT = {"reconstruction": "recon", "auxiliary": "aux"}
"""Titles of columns that would leave no room for the names of SAEs."""

COLUMNS = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))


class LiveProgress(TrainerCallback):
    """A bar above a table with the latest numbers of each SAE; where there is no terminal, a line for each log.

    Args:
        console: where to show them.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(*COLUMNS, TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", total=None)
        self._live = Live(self._bar, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveProgress:
        """Begin to show."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, also when training has failed."""
        self._live.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest numbers."""
        rows = _rows(logs or {})
        if not rows:
            return
        if self.console.is_terminal:
            self._live.update(Group(self._bar, table(rows)))
            return
        for name, found in rows.items():
            text = ", ".join(f"{title} {value}" for title, value in found.items())
            where = " ".join(filter(None, (str(state.global_step), name)))
            self.console.print(f"step {where}: {text}", soft_wrap=True, markup=False, highlight=False)


def _rows(logs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the numbers of each SAE; of several, those of all of them come last."""
    found = numbers(logs)
    if len(found) > 1:  # of several SAEs, the loss is the sum of all
        found["all"] = found.pop("", {})
    return found


def table(rows: dict[str, dict[str, str]]) -> Table:
    """Return the numbers, one SAE per row."""
    titles = list(dict.fromkeys(title for found in rows.values() for title in found))
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if len(rows) > 1:
        made.add_column("SAE", overflow="fold")
    for title in titles:
        made.add_column(SHORT.get(title, title), justify="right", no_wrap=True)
    for name, found in rows.items():
        made.add_row(*([name] if len(rows) > 1 else []), *(found.get(title, "") for title in titles))
    return made
