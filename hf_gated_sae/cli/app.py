"""The command-line application: finds the subcommands, and prints errors as one line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from .. import __version__
from ..errors import SAEError

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
HELP = {"help_option_names": ["-h", "--help"]}
SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Raises|Returns|Yields):$", re.MULTILINE)
"""Headings of the docstring sections that the help does not show."""


class Command(TyperCommand):
    """A subcommand: its help is its docstring without sections, and Ctrl-C ends it with a message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = help_text(self.help or "")

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with interruptible():
            return super().invoke(ctx)


app = typer.Typer(
    name="hf-gated-sae",
    help="Pretrained sparse autoencoders, hooked into any Hugging Face causal language model.",
    context_settings=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-gated-sae {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def help_text(docstring: str) -> str:
    """Return the help text of a docstring: without sections, with one line per paragraph.

    >>> help_text("Do it\\n    at once.\\n\\n    Raises:\\n        InputError: never.")
    'Do it at once.'
    """
    text = SECTION.split(inspect.cleandoc(docstring))[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def main() -> None:
    """Run the command; an error of this package is printed as one line (exit status 1), and so is Ctrl-C (130)."""
    try:
        _run()
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(INTERRUPTED)
    except Exception as error:  # libraries convert Ctrl-C to errors of their own; all others are raised again
        if not _is_interruption(error):
            raise
        say_interrupted()
        sys.exit(INTERRUPTED)


@contextmanager
def interruptible(next_steps: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """End the command when Ctrl-C is pressed within the block.

    Args:
        next_steps: returns what was written and how to continue, in a sentence or two.
    """
    try:
        yield
    except KeyboardInterrupt as interrupted:
        say_interrupted(next_steps())
        raise typer.Exit(INTERRUPTED) from interrupted
    except Exception as error:  # as in `main`
        if not _is_interruption(error):
            raise
        say_interrupted(next_steps())
        raise typer.Exit(INTERRUPTED) from error


def _is_interruption(error: BaseException) -> bool:
    """Whether an error was caused by Ctrl-C, such as those of transformers when an import is interrupted."""
    if isinstance(error, typer.Exit):
        return False
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


def say_interrupted(more: str = "") -> None:
    """Print that the command was interrupted, and how to continue, in one line."""
    text = f"Interrupted. {more}".rstrip()
    Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)


def load_commands() -> None:
    """Import every subcommand, those of other packages included; each adds itself to `app`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "app":
            importlib.import_module(f"{__package__}.{module.name}")
    for entry in entry_points(group="hf_gated_sae.cli"):
        entry.load()


def _run() -> None:
    """Import every subcommand and run the requested one."""
    load_commands()
    try:
        with _plain_warnings():
            app(prog_name="hf-gated-sae")  # also if it was started by Python or a test runner
    except SAEError as error:
        _say_error(str(error))
    except OSError as error:  # a full disk, a read-only folder
        if not error.strerror:
            raise
        _say_error(f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}.")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings for users as one line, without the line of source code that raised them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is not UserWarning:
            usual(message, category, *where, **more)
            return
        Console(stderr=True, soft_wrap=True).print(f"[bold yellow]warning:[/] {escape(str(message))}", highlight=False)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _say_error(text: str) -> NoReturn:
    """Print an error as one line, and exit."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)
    sys.exit(1)
