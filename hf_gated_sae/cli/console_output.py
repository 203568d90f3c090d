"""Output of commands: results on stdout; progress, hints and errors on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cached_property
from os import PathLike
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results only: no progress, no hints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]

EVERY = 10.0
"""Seconds between progress lines of a long step, without a terminal."""


class Output:
    """The output of a command.

    Args:
        quiet: omit progress and hints.
        as_json: print one JSON document instead of text.
        silent: print nothing at all.

    Attributes:
        results: the console of results, stdout; silent with `as_json`.
        notes: the console of everything else, stderr; silent with `quiet`.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, *, silent: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.silent = silent

    @cached_property
    def results(self) -> Console:
        """The console of results."""
        return Console(quiet=self.as_json or self.silent)

    @cached_property
    def notes(self) -> Console:
        """The console of notes."""
        return Console(stderr=True, quiet=self.quiet)

    def show(self, *parts: RenderableType) -> None:
        """Print results, unless a JSON document is printed instead."""
        for part in parts:
            self.results.print(part, highlight=False)

    def document(self, content: Any) -> None:
        """Print the JSON document, if one is requested.

        Args:
            content: dataclasses, mappings, sequences, paths, strings and numbers; non-finite numbers become null.
        """
        if self.as_json and not self.silent:
            typer.echo(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False))

    def note(self, text: str) -> None:
        """Print a hint, in rich's markup."""
        self.notes.print(text, highlight=False)

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Context in which transformers and the Hub's client show bars in a terminal only, and none if quiet."""
        from ..modeling.transformers_settings import without_bars  # here, so that --help does not wait for torch

        with nullcontext() if self.notes.is_terminal and not self.quiet else without_bars():
            yield

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Show the current step: a spinner in a terminal, otherwise one line per step."""
        with Steps(self.notes) as steps:
            yield steps


class Steps:
    """Shows which of several steps is running, and its progress.

    Args:
        console: to print to; without a terminal it gets one line per step, and further ones during a long step.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # not needed by --help

        self.console = console
        columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task("starting", total=1)
        self._start = time.monotonic()
        self._number, self._printed_at = -1, 0.0

    def __enter__(self) -> Steps:
        """Start the display."""
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the display, also after an error."""
        if self.console.is_terminal:
            self._bar.stop()

    def __call__(self, step: str, number: int, total: int) -> None:
        """Show the current step.

        Args:
            step: description, possibly with its progress.
            number: of the step, starting at 1.
            total: number of steps.
        """
        if self.console.is_terminal:
            self._bar.update(self._task, description=step, completed=number, total=total)
            return
        now = time.monotonic()
        if number != self._number or now - self._printed_at >= EVERY:
            self._number, self._printed_at = number, now
            text = f"{now - self._start:4.0f} s  {number}/{total} {step}"
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def plain(value: Any) -> Any:
    """Convert a value to types that JSON supports.

    >>> plain({"loss": float("nan"), "tokens": (1, 2)})
    {'loss': None, 'tokens': [1, 2]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(each) for each in value]
    raise TypeError(f"{type(value).__name__} cannot be converted to JSON")
