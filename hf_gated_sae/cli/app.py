"""The command line as a whole: it finds its subcommands, and turns errors into one sentence."""

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
"""Exit status of a program that Ctrl-C has ended."""
HELP = {"help_option_names": ["-h", "--help"]}
SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Raises|Returns|Yields):$", re.MULTILINE)
"""Where a docstring goes on for readers of the code."""


class Command(TyperCommand):
    """A subcommand: its help is what its docstring says to users, and Ctrl-C ends it with a sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = help_text(self.help or "")

    def invoke(self, ctx: Any) -> Any:
        """Carry it out."""
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    pass


def help_text(docstring: str) -> str:
    """Return what a docstring says to users: without sections, each paragraph one line, which is wrapped when shown.

    >>> help_text("Do it\\n    at once.\\n\\n    Raises:\\n        InputError: never.")
    'Do it at once.'
    """
    text = SECTION.split(inspect.cleandoc(docstring))[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def main() -> None:
    """Run the command; an error of this package becomes one line and exit status 1, Ctrl-C one and status 130."""
    try:
        _run()
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(INTERRUPTED)
    except Exception as error:  # only to tell what a library made of Ctrl-C; all else is raised again
        if not _is_interruption(error):
            raise
        say_interrupted()
        sys.exit(INTERRUPTED)


@contextmanager
def interruptible(how_to_go_on: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """End the command when Ctrl-C is pressed within the block.

    Args:
        how_to_go_on: returns what there is, and what can be done now, in a sentence or two.
    """
    try:
        yield
    except KeyboardInterrupt as interrupted:
        say_interrupted(how_to_go_on())
        raise typer.Exit(INTERRUPTED) from interrupted
    except Exception as error:  # as in `main`
        if not _is_interruption(error):
            raise
        say_interrupted(how_to_go_on())
        raise typer.Exit(INTERRUPTED) from error


def _is_interruption(error: BaseException) -> bool:
    """Whether an error is what a library made of Ctrl-C, as transformers does where an import is interrupted."""
    if isinstance(error, typer.Exit):
        return False
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


def say_interrupted(more: str = "") -> None:
    """Say, in a line of its own, that Ctrl-C was understood, and what can be done now."""
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
    """Import every subcommand and carry one out."""
    load_commands()
    try:
        with _plain_warnings():
            app(prog_name="hf-gated-sae")  # also where Python or a test runner was started
    except SAEError as error:
        _say_error(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        if not error.strerror:
            raise
        _say_error(f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}.")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show what is meant for users as one line, without the place in the source that says it."""
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
    """Say what is wrong, in one line, and end."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)
    sys.exit(1)
