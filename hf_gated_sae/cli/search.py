"""`hf-gated-sae search`: find pretrained SAEs, with the code that loads each."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from . import complete
from .app import Command, app
from .argument_checks import require_at_least
from .console_output import AsJson, Output, Quiet
from .tables import l0_text

if TYPE_CHECKING:
    from ..catalog.search_result import SearchResult

SHOWN_REPOSITORIES = 4


@app.command(cls=Command)
def search(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Base model: Hub id, or a short name such as gpt2. Or a release, or a Neuronpedia id.",
            autocompletion=complete.base_models,
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Site, such as resid_post or resid_post.12; names of other libraries are accepted as well.",
            autocompletion=complete.sites,
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the site.")] = None,
    width: Annotated[str | None, typer.Option(help="Number of latents, such as 16384 or 16k.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Such as gated or jumprelu.", autocompletion=complete.architectures)
    ] = None,
    l0: Annotated[float | None, typer.Option(help="Only the SAEs whose L0 is nearest to this.")] = None,
    limit: Annotated[int, typer.Option(help="Rows to show; 0 for all.")] = 20,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Also list repositories on the Hub.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find pretrained SAEs, and print the line of code that loads each.

    The exit status is 1 if none is found, as with grep.
    """
    from ..catalog.index_search import search as find  # here, so that --help does not wait for torch
    from .site_names import site_of

    for option, value in (("--limit", limit), ("--layer", layer), ("--l0", l0)):
        require_at_least(option, value, 0)
    out = Output(quiet, as_json)
    site = None if site is None else site_of(site)
    with out.bars():
        found = find(model, site=site, layer=layer, width=width, architecture=architecture, near_l0=l0, live=live)
    rows = found[:limit] if limit else found
    out.document({"found": len(found), "saes": [record(result) for result in rows]})
    if not found:
        out.note(f"No SAE found.{_alternatives(model, layer, live)}")
        raise typer.Exit(1)
    out.show(table(rows, with_model=model is None))
    if any(result.l0_kind == "target" for result in rows):
        out.show("[dim]L0 with ~: target of training, not a measurement.\n[/]")
    out.show("[bold]from hf_gated_sae import SAEModel[/]")
    for number, result in enumerate(rows, 1):
        out.results.print(code(result, number, out.results.width), highlight=False, soft_wrap=True)
    if len(found) > len(rows):
        out.note(f"\n{_left_out(found[len(rows) :])}")


def record(result: SearchResult) -> dict[str, Any]:
    """Return the facts of a search result, and the code that loads it, for the JSON document."""
    return {**{each.name: getattr(result, each.name) for each in fields(result)}, "code": result.code}


def table(rows: list[SearchResult], *, with_model: bool) -> Table:
    """Return a numbered table of the SAEs; repository and address are in the code of the same number."""
    made = Table(box=SIMPLE_HEAD)
    made.add_column("#", justify="right", no_wrap=True)
    if with_model:
        made.add_column("base model", overflow="fold")
    made.add_column("site", overflow="fold")
    made.add_column("latents", justify="right", no_wrap=True)
    made.add_column("kind", no_wrap=True)
    made.add_column("L0", justify="right", no_wrap=True)
    made.add_column("by", overflow="fold")
    for number, result in enumerate(rows, 1):
        site = f"{result.site} > {result.site_out}" if result.site_out else result.site
        cells = [site, result.d_sae and f"{result.d_sae:,}", result.architecture]
        cells += [None if result.l0 is None else l0_text(result.l0, result.l0_kind), result.repo.split("/")[0]]
        first = [result.base_model] if with_model else []
        made.add_row(str(number), *(escape(str(cell or "?")) for cell in [*first, *cells]))
    return made


def code(result: SearchResult, number: int | None, width: int) -> str:
    """Return the code that loads a result, with one argument per line if one line would be too long."""
    lead, line = "" if number is None else f"{number:>3}  ", result.code
    if len(lead) + len(line) > width:
        opening = line[: line.index("(") + 1]
        between = ",\n" + " " * (len(lead) + len(opening))
        line = f"{opening}{between.join(result.arguments)})"
    return f"[dim]{lead}[/]{escape(line)}" if lead else escape(line)


def _left_out(rest: list[SearchResult]) -> str:
    """Return the message about results that are not shown, by repository."""
    by_repository = Counter(result.repo for result in rest).most_common()
    named = ", ".join(f"{repo} ({number})" for repo, number in by_repository[:SHOWN_REPOSITORIES])
    more = f" and {len(by_repository) - SHOWN_REPOSITORIES} more" if len(by_repository) > SHOWN_REPOSITORIES else ""
    narrower = "Narrow with --site, --layer, --width or --l0, or --limit 0 for all."
    return f"{len(rest):,} more: {escape(named)}{more}. {narrower}"


def _alternatives(model: str | None, layer: int | None, live: bool) -> str:
    """Return the layers, or the sites and widths, of a base model's SAEs, for a search that found nothing."""
    from ..catalog.index_search import search as find

    if model is None:
        return " Omit an option."
    found = find(model, live=live)
    if not found:
        return f" None is known for {escape(model)}."
    layers = sorted({result.layer for result in found if result.layer is not None})
    if layer is not None and layers and layer not in layers:
        return f" {escape(model)} has SAEs at layers {', '.join(map(str, layers))}."
    at = [result for result in found if layer is None or result.layer == layer]
    widths = sorted({result.d_sae for result in at if result.d_sae})
    sites = sorted({(result.site or "").split(".")[0] for result in at if result.site})
    return f" Known sites: {', '.join(sites) or '?'}; widths: {', '.join(map(str, widths)) or '?'}."
