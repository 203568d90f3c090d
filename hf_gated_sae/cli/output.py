"""Where a command says what: its results on stdout; on stderr its progress, its hints and its errors."""

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
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]

EVERY = 10.0
"""Without a terminal, seconds after which a step that still runs says how far it is."""


class Output:
    """What a command shows.

    Args:
        quiet: leave out progress and hints.
        as_json: print one JSON document in place of text.
        silent: print nothing at all.

    Attributes:
        results: the console of what was asked for, stdout; silent where that is a JSON document.
        notes: the console of everything else, stderr; silent if `quiet`.
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
        """Print results, unless a document takes their place."""
        for part in parts:
            self.results.print(part, highlight=False)

    def document(self, content: Any) -> None:
        """Print the JSON document, if one is asked for.

        Args:
            content: dataclasses, mappings, sequences, paths, texts and numbers; a number that is not finite is null.
        """
        if self.as_json and not self.silent:
            typer.echo(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False))

    def note(self, text: str) -> None:
        """Print a hint; its markup is rich's."""
        self.notes.print(text, highlight=False)

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Keep the progress bars of transformers and of the Hub's client to terminals, and out of them if quiet."""
        from ..modeling.transformers_settings import without_bars  # here, so that --help does not wait for torch

        with nullcontext() if self.notes.is_terminal and not self.quiet else without_bars():
            yield

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Show which step is being done: a spinner in a terminal, elsewhere a line for each."""
        with Steps(self.notes) as steps:
            yield steps


class Steps:
    """Says which of several steps is being done, and how far it is.

    Args:
        console: where to; one that is no terminal gets a line for each step, and one now and then during a long one.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # --help needs none of it

        self.console = console
        columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task("starting", total=1)
        self._start = time.monotonic()
        self._number, self._said = -1, 0.0

    def __enter__(self) -> Steps:
        """Begin to show."""
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, also when the work has failed."""
        if self.console.is_terminal:
            self._bar.stop()

    def __call__(self, step: str, number: int, total: int) -> None:
        """Say what is being done.

        Args:
            step: what, perhaps with how much of it is done.
            number: its number, from 1 on.
            total: the number of steps.
        """
        if self.console.is_terminal:
            self._bar.update(self._task, description=step, completed=number, total=total)
            return
        now = time.monotonic()
        if number != self._number or now - self._said >= EVERY:
            self._number, self._said = number, now
            text = f"{now - self._start:4.0f} s  {number}/{total} {step}"
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it.

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
    raise TypeError(f"{type(value).__name__} has no form in JSON")
