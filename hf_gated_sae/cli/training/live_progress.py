"""Progress of a training run, shown in a terminal or as lines of text."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ...training.held_out import NAMES
from ...training.phases import Phase, PhaseCallback
from ...training.progress_bar import numbers
from .pace import Pace

SHORT = {"reconstruction": "recon", "auxiliary": "aux"}
"""Short titles of columns, to leave room for the names of SAEs."""
TRAINING = "training"
EVERY = 30.0
"""Seconds between progress lines of a phase, without a terminal."""
HELD_OUT = {"loss_recovered": "loss recovered", "fvu": "FVU", "gamma": "gamma", "l0": "L0"}
"""Metrics shown of an evaluation on held-out text, with their titles."""


class LiveProgress(PhaseCallback):
    """Shows a bar for each phase above a table with the latest metrics of each SAE; without a terminal, lines.

    Args:
        console: to print to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", justify="right"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._printed_at: dict[str, float] = {}
        self._pace = Pace()
        self._tables: dict[str, Table] = {}
        self._live = Live(self._bars, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveProgress:
        """Start the display."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the display, also after an error."""
        self._live.stop()

    # ------------------------------------------------------------------ phases

    def on_phase(self, phase: Phase, done: int, total: int) -> None:
        """Move the bar of a phase."""
        now = time.monotonic()
        if phase not in self._began or done == 0:
            self._began[phase] = now
        took = now - self._began[phase]
        if phase is Phase.FILL:
            self._pace.filling(done, total)
        elif phase is Phase.HELD_OUT and done >= total:
            self._pace.paused(took)
        left = took * (total - done) / done if done else None
        ends = done >= total
        self._show(phase, done, total, _took(took) if ends else _left(left))
        is_refill = phase is Phase.FILL and TRAINING in self._tasks
        if ends:
            del self._began[phase]
        if self.console.is_terminal:
            self._bars.update(self._tasks[phase], visible=not (ends and (is_refill or phase is Phase.HELD_OUT)))
        elif not is_refill and (ends or now - self._printed_at.get(phase, 0.0) > EVERY):
            self._printed_at[phase] = now
            unit = "tokens" if phase is Phase.HELD_OUT else "activations"
            amount = f"{total:,} {unit}" if done in (0, total) else f"{done:,} of {total:,} {unit}"
            self._line(", ".join(filter(None, (f"{phase}: {amount}", _took(took) if ends else _left(left)))))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the start of a step."""
        self._pace.step_begins()
        self._began.setdefault(TRAINING, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar of the steps."""
        self._pace.step_ends(self._rows(args))
        took = time.monotonic() - self._began[TRAINING]
        ends = state.global_step >= state.max_steps
        self._show(TRAINING, state.global_step, state.max_steps, _took(took) if ends else self._remaining(args, state))

    def _remaining(self, args: Any, state: Any) -> str:
        pauses = sum(step > state.global_step for step in args.evaluation_steps)
        return _left(self._pace.left(state.max_steps - state.global_step, self._rows(args), pauses))

    @staticmethod
    def _rows(args: Any) -> int:
        return int(args.activation_batch_size * args.gradient_accumulation_steps)

    def _show(self, name: str, done: int, total: int, left: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(str(name), total=total, left=left)
        self._bars.update(self._tasks[name], completed=done, total=total, left=left)

    # ------------------------------------------------------------------ numbers

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest metrics."""
        held_out = held_out_numbers(logs or {})
        rows = held_out or _rows(logs or {})
        if not rows:
            return
        if self.console.is_terminal:
            title = f"held-out text, step {state.global_step:,}" if held_out else f"step {state.global_step:,}"
            self._tables["held out" if held_out else "batch"] = table(rows, title)
            self._live.update(Group(self._bars, *self._tables.values()))
            return
        for name, found in rows.items():
            text = ", ".join(f"{title} {value}" for title, value in found.items())
            where = " ".join(filter(None, (str(state.global_step), name, "held-out" if held_out else "")))
            left = "" if held_out else f" ({self._remaining(args, state)})"
            self._line(f"step {where}: {text}{left}")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def held_out_numbers(logs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the metrics to show of an evaluation on held-out text, by SAE and title; nothing for other log entries.

    >>> held_out_numbers({"eval_loss_recovered": 0.987, "eval_fvu": 0.1, "eval_loss_clean": 3.2, "epoch": 0.5})
    {'': {'loss recovered': '0.987', 'FVU': '0.1'}}
    """
    found: dict[str, dict[str, str]] = {}
    for key, value in logs.items():
        lead, _, metric = key.rpartition("/") if "/" in key else ("eval", "", key.removeprefix("eval_"))
        if key.startswith("eval_") and metric in NAMES and metric in HELD_OUT:
            name = lead.removeprefix("eval_") if "/" in key else ""
            found.setdefault(name, {})[HELD_OUT[metric]] = f"{value:.3g}"
    return found


def _rows(logs: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the metrics of each SAE; with several SAEs, those of all together come last."""
    found = numbers(logs)
    if len(found) > 1:  # the loss without a name is the sum over all SAEs
        found["all"] = found.pop("", {})
    return found


def table(rows: dict[str, dict[str, str]], title: str | None = None) -> Table:
    """Return a table of the metrics, one SAE per row."""
    titles = list(dict.fromkeys(name for found in rows.values() for name in found))
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    if len(rows) > 1:
        made.add_column("SAE", overflow="fold")
    for name in titles:
        made.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for name, found in rows.items():
        made.add_row(*([name] if len(rows) > 1 else []), *(found.get(each, "") for each in titles))
    return made


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{_clock(seconds)} left"


def _took(seconds: float) -> str:
    return f"took {_clock(seconds)}"
