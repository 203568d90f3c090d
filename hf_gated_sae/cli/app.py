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
    """Run the command; an error of this package becomes one line and exit status 1."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "app":
            importlib.import_module(f"{__package__}.{module.name}")
    try:
        app()
    except SAEError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
