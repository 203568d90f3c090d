"""The command line as a whole: it finds its subcommands, and turns errors into one sentence."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import SAEError

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C has ended."""

app = typer.Typer(
    name="hf-gated-sae",
    help="Pretrained sparse autoencoders, hooked into any Hugging Face causal language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keep subcommands subcommands, even while there is only one."""


def main() -> None:
    """Run the command; an error of this package becomes one line and exit status 1, Ctrl-C one and status 130."""
    try:
        _run()
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(INTERRUPTED)
    except Exception as error:  # as transformers turns what interrupts an import of its own into another error
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        say_interrupted()
        sys.exit(INTERRUPTED)


def say_interrupted(more: str = "") -> None:
    """Say, in a line of its own, that Ctrl-C was understood, and what can be done now."""
    text = f"Interrupted. {more}".rstrip()
    Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)


def _run() -> None:
    """Import every subcommand and carry one out."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "app":
            importlib.import_module(f"{__package__}.{module.name}")
    try:
        app()
    except SAEError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
