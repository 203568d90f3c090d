"""`hf-gated-sae convert`: somebody else's checkpoint in our own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import InputError
from .app import app

if TYPE_CHECKING:
    from ..publishing import Conversion


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hub id, id@revision, or folder.")],
    address: Annotated[
        str, typer.Argument(metavar="[SUBFOLDER]", help="Folder (or file) of the SAE in the source.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write into.")] = None,
    push: Annotated[str | None, typer.Option(help="Repository to publish to, such as me/my-sae.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository of --push.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: as it is stored.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, for a source that states none.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Of the licence other, what it is called.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Of the licence other, LICENSE or an address.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Publish to a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    format: Annotated[str | None, typer.Option(help="Layout, where several share the folder.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Of a home-made checkpoint, in no known layout: such as standard.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Of a home-made one, a tensor: W_enc=encoder.weight. Repeatable."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Of a home-made one, a tensor to leave out. Repeatable.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Where it belongs: resid_post.3.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The model whose activations it reads.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of the configuration: k=32. Repeatable.")
    ] = None,
) -> None:
    """Convert a checkpoint of any known layout, or a home-made one, with a card that says whose it is."""
    from ..publishing import convert as find  # here, so that --help does not wait for torch

    if (out is None) == (push is None):
        given = "neither" if out is None else "both"
        raise InputError(f"Given {given} of --out and --push; expected one: where is the converted SAE to go?")
    if push is None and (subfolder or private or create_pr):
        raise InputError("--subfolder, --private and --create-pr say how to publish; pass them with --push.")
    console = Console(soft_wrap=True)
    names = {ours: theirs or None for ours, theirs in _pairs("--name", name, "W_enc=encoder.weight").items()}
    options: dict[str, Any] = {key: _value(text) for key, text in _pairs("--option", option, "k=32").items()}
    options |= {key: text for key, text in (("site", site), ("base_model", base_model)) if text is not None}
    conversion = find(
        source,
        address,
        revision=revision,
        dtype=dtype,
        license=license,
        license_name=license_name,
        license_link=license_link,
        format=format,
        architecture=architecture,
        names=names,
        ignore=ignore or (),
        options=options,
    )
    _show(console, conversion, site)
    if out is not None:
        console.print(f"[bold]written[/] {escape(str(conversion.save(out)))}", highlight=False)
    elif push is not None:
        commit = conversion.push(push, subfolder=subfolder, private=private or None, create_pr=create_pr)
        console.print(f"[bold]pushed[/]  {escape(commit.pr_url or commit.commit_url)}", highlight=False)


def _show(console: Console, conversion: Conversion, site: str | None) -> None:
    """Print what is converted."""
    checkpoint = conversion.checkpoint
    sites = site or ", ".join(checkpoint.config.sites_read) or "a site that is not stated"
    console.print(
        f"[bold]from[/]    {escape(str(checkpoint))}, layout {checkpoint.origin.format}\n"
        f"[bold]SAE[/]     {checkpoint.model_class.__name__} at {escape(sites)}, "
        f"{checkpoint.config.d_in} to {checkpoint.config.d_sae:,}\n"
        f"[bold]licence[/] {escape(conversion.licence.name or 'unknown')} ({escape(conversion.licence.evidence)})",
        highlight=False,
    )


def _pairs(option: str, given: list[str] | None, example: str) -> dict[str, str]:
    """Return what was given as ``key=value``.

    Raises:
        InputError: if something has another form, or a key is given twice.
    """
    pairs: dict[str, str] = {}
    for text in given or []:
        key, sign, value = text.partition("=")
        if not sign or not key or key in pairs:
            what = f"two values of {key}" if key in pairs else repr(text)
            raise InputError(f"{option} is given {what}; expected each key once, such as {example}.")
        pairs[key] = value
    return pairs


def _value(text: str) -> Any:
    """Return a value as JSON reads it, else as a text: ``32``, ``true``, ``layer_norm``."""
    try:
        return json.loads(text)
    except ValueError:
        return text
