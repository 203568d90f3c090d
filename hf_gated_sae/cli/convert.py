"""`hf-gated-sae convert`: convert another library's checkpoint to the native layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import InputError
from . import complete
from .app import Command, app, interruptible
from .argument_checks import modification_time, require_writable
from .console_output import AsJson, Output, Quiet

if TYPE_CHECKING:
    from ..publishing import Conversion


@app.command(cls=Command)
def convert(
    source: Annotated[str, typer.Argument(help="Hub id, id@revision, or folder.")],
    address: Annotated[
        str, typer.Argument(metavar="[SUBFOLDER]", help="Folder (or file) of the SAE in the source.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write into.")] = None,
    push: Annotated[str | None, typer.Option(help="Repository to publish to, such as me/my-sae.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository of --push.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the result, such as bfloat16. Default: that of the source.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence, for a source that states none.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of the licence, with --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Its URL, or LICENSE for a file in the repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Publish to a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    format: Annotated[str | None, typer.Option(help="Layout to read, if several claim the folder.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="Architecture of a home-made checkpoint, which has no known layout, such as standard.",
            autocompletion=complete.architectures,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="PARAMETER=TENSOR", help="Home-made checkpoint: W_enc=encoder.weight. Repeatable."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Home-made checkpoint: a tensor to leave out. Repeatable.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Home-made checkpoint: the site, such as resid_post.3.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Home-made checkpoint: the model it reads.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Home-made checkpoint: a setting, k=32. Repeatable.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint of any known layout, or a home-made one, with a card that credits its authors."""
    from ..publishing import convert as find  # here, so that --help does not wait for torch

    if (out is None) == (push is None):
        given = "neither" if out is None else "both"
        raise InputError(f"Given {given} of --out and --push; expected one, as the target of the converted SAE.")
    if push is None and (subfolder or private or create_pr):
        raise InputError("--subfolder, --private and --create-pr only apply to publishing; pass them with --push.")
    if out is not None:
        require_writable("--out", out)
    output = Output(quiet, as_json)
    names = {parameter: tensor or None for parameter, tensor in _pairs("--name", name, "W_enc=encoder.weight").items()}
    options: dict[str, Any] = {key: _value(text) for key, text in _pairs("--option", option, "k=32").items()}
    options |= {key: text for key, text in (("site", site), ("base_model", base_model)) if text is not None}
    settings: dict[str, Any] = {
        **{"revision": revision, "dtype": dtype, "license": license, "format": format},
        **{"license_name": license_name, "license_link": license_link, "architecture": architecture},
        **{"names": names, "ignore": ignore or (), "options": options},
    }
    written: dict[str, str] = {}
    before = modification_time(out)
    with interruptible(lambda: _after_interruption(out, push, is_new=modification_time(out) != before)), output.bars():
        conversion = find(source, address, **settings)
        with output.notes.status("reading and writing the weights"):
            if out is not None:
                written["written"] = str(conversion.save(out))
            elif push is not None:
                commit = conversion.push(push, subfolder=subfolder, private=private or None, create_pr=create_pr)
                written["pushed"] = commit.pr_url or commit.commit_url
        facts = _facts(conversion, site)
        output.document({**facts, **written})
        _show(output, facts, written)


def _after_interruption(out: Path | None, push: str | None, *, is_new: bool) -> str:
    """Return the message after Ctrl-C: what was written, and how to continue."""
    if is_new:
        return f"The converted SAE was written to {out} before that."
    where = f"written to {out}" if out is not None else f"committed to {push}"
    return f"Nothing was {where}; the same command starts again, and downloaded files stay in the Hub cache."


def _facts(conversion: Conversion, site: str | None) -> dict[str, Any]:
    """Return a description of the converted SAE, for the JSON document."""
    checkpoint = conversion.checkpoint
    return {
        "from": str(checkpoint),
        "layout": checkpoint.origin.format,
        "class": checkpoint.model_class.__name__,
        "sites": [site] if site else list(checkpoint.config.sites_read),
        "d_in": checkpoint.config.d_in,
        "d_sae": checkpoint.config.d_sae,
        "license": conversion.licence.name,
        "license_evidence": conversion.licence.evidence,
    }


def _show(output: Output, facts: dict[str, Any], written: dict[str, str]) -> None:
    """Print a description of the converted SAE, and where it was written."""
    sites = ", ".join(facts["sites"]) or "a site that is not stated"
    lines = [
        f"[bold]from[/]    {escape(facts['from'])}, layout {facts['layout']}",
        f"[bold]SAE[/]     {facts['class']} at {escape(sites)}, {facts['d_in']} to {facts['d_sae']:,}",
        f"[bold]licence[/] {escape(facts['license'] or 'unknown')} ({escape(facts['license_evidence'])})",
        *(f"[bold]{what:<7}[/] {escape(where)}" for what, where in written.items()),
    ]
    output.results.print("\n".join(lines), highlight=False, soft_wrap=True)


def _pairs(option: str, given: list[str] | None, example: str) -> dict[str, str]:
    """Parse the values ``key=value`` of an option.

    Raises:
        InputError: if a value has another form, or a key is given twice.
    """
    pairs: dict[str, str] = {}
    for text in given or []:
        key, sign, value = text.partition("=")
        if not sign or not key or key in pairs:
            what = f"two values of {key}" if key in pairs else repr(text)
            raise InputError(f"{option} has {what}; expected each key once, such as {example}.")
        pairs[key] = value
    return pairs


def _value(text: str) -> Any:
    """Return a value parsed as JSON if possible, otherwise as a string: ``32``, ``true``, ``layer_norm``."""
    try:
        return json.loads(text)
    except ValueError:
        return text
