"""`hf-gated-sae info`: describe an SAE, or a repository of SAEs, without weights; or list the sites of a model."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..errors import InputError, MissingFileError, SAEError
from . import complete
from .app import Command, app
from .console_output import AsJson, Output, Quiet
from .tables import facts_grid, l0_text

if TYPE_CHECKING:
    from ..hub.location import Location
    from ..modeling.checkpoint import Checkpoint

SHOWN_ROWS = 16
SHOWN_ADDRESSES = 6
OPENED = 24
"""Largest number of SAEs without an index entry whose headers are read, with a few small requests each."""
ALWAYS_SHOWN = ("base model", "site", "trained on BOS")
"""Facts that are shown as "not stated" if they are unknown."""
_NUMBER = re.compile(r"(?<![a-z]l)(?<!_l)\d+(?!\d*[km])")
"""Numbers that differ between addresses of one kind: not the name "l0", and not a width."""
UNITS = ("B", "kB", "MB", "GB", "TB")


@app.command(cls=Command)
def info(
    repo: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder, or a release of the index.", autocompletion=complete.releases),
    ] = None,
    subfolder: Annotated[str, typer.Argument(help="Folder or file of the SAE inside it.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Load this causal LM instead, and prove its sites.")
    ] = None,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="List architectures, layouts and other plug-ins.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Describe an SAE, or a repository of SAEs, without downloading weights; or a model's sites, by loading it.

    If the repository cannot be reached, for example offline, its entries of the index are shown.

    Raises:
        InputError: unless exactly one of REPO, --model and --plugins is given.
    """
    if plugins and repo is None and model is None:
        from .plugins import show_plugins

        show_plugins(Output(quiet, as_json))
        return
    if plugins:
        raise InputError(f"info --plugins lists what is installed; it was given {repo or f'--model {model}'}, too.")
    if (repo is None) == (model is None):
        given = "neither" if repo is None else f"both, {repo} and --model {model}"
        raise InputError(
            f"Given {given}; expected a repository of SAEs, 'hf-gated-sae info REPO', or a model, 'hf-gated-sae info "
            "--model MODEL'."
        )
    out = Output(quiet, as_json)
    if repo is None:
        from .model_sites import show_sites

        assert model is not None
        show_sites(out, model, revision)
        return
    try:
        with out.bars():
            _show_location(out, repo, subfolder, revision)
    except MissingFileError as error:
        from .known import show_known

        if not show_known(out, repo, subfolder, revision, error):
            raise


def _show_location(out: Output, repo: str, subfolder: str, revision: str | None) -> None:
    """Print the SAE, or the SAEs, in a repository or folder, or in a subfolder of it."""
    from ..formats import locate_sae, open_at, sae_addresses  # here, so that --help does not wait for torch

    location = locate_sae(repo, subfolder, revision=revision)
    addresses = sae_addresses(location)
    if location.address in addresses or len(addresses) < 2:
        if location.address not in addresses and addresses:
            location = location.at(addresses[0])
        _show_one(out, open_at(location), location)
    else:
        _show_many(out, location, addresses)


def _show_one(out: Output, checkpoint: Checkpoint, location: Location) -> None:
    """Print one SAE."""
    found = record(checkpoint, location)
    base = " @ ".join(filter(None, (found["base_model"], found["base_model_revision"])))
    written = found["sites_written"] != found["sites"]
    facts = {
        "repository": found["repository"],
        "address": found["address"],
        "commit": found["commit"],
        "licence": found["license"] or found["license_evidence"],
        "layout": found["layout"],
        "architecture": f"{found['architecture']} ({found['class']})",
        "base model": base,
        "site": ", ".join(found["sites"]),
        "writes to": ", ".join(found["sites_written"]) if written else None,
        "normalisation": found["normalization"],
        "trained on BOS": {True: "yes", False: "no", None: None}[found["trained_on_bos"]],
        "latents": f"{found['d_sae']:,}",
        "L0": _l0(found["l0"], found["l0_kind"]),
        "width": str(found["d_in"]) if found["d_in"] == found["d_out"] else "{d_in} in, {d_out} out".format(**found),
        "tensors": "\n".join(f"{name} {shape}" for name, shape in found["tensors"].items()),
        "stored as": ", ".join(found["dtypes"]),
        "download": size_text(found["download_bytes"]),
        "dashboards": found["dashboards"],
    }
    out.document(found)
    out.show(
        facts_grid({name: value or "not stated" for name, value in facts.items() if value or name in ALWAYS_SHOWN})
    )
    _show_code(out, location.repo, checkpoint.origin.subfolder, checkpoint.origin.revision)


def record(checkpoint: Checkpoint, location: Location) -> dict[str, Any]:
    """Return the facts in the headers and the configuration of an SAE, for the JSON document."""
    from ..catalog.search_result import SearchResult
    from ..hub.index import known_at, known_facts

    config, origin = checkpoint.config, checkpoint.origin
    neuronpedia = known_facts(location.repo_id, location.address).get("neuronpedia")
    known = known_at(location.repo_id, location.address)
    return {
        "repository": origin.repo,
        "address": origin.subfolder or None,
        "commit": origin.revision,
        **licence(location),
        "layout": origin.format,
        "architecture": config.architecture,
        "class": checkpoint.model_class.__name__,
        "base_model": config.base_model,
        "base_model_revision": config.base_model_revision,
        "sites": list(config.sites_read),
        "sites_written": list(config.sites_written),
        "normalization": config.normalization,
        "trained_on_bos": config.trained_on_bos,
        "d_in": config.d_in,
        "d_out": config.d_out,
        "d_sae": config.d_sae,
        "l0": known.l0 if known else None,
        "l0_kind": known.l0_kind if known else None,
        "tensors": {name: list(tensor.shape) for name, tensor in checkpoint.shapes(config).items()},
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.stored.values()}),
        "download_bytes": sum({id(t.source): t.source.size for t in checkpoint.stored.values()}.values()),
        "dashboards": f"https://www.neuronpedia.org/{neuronpedia}" if neuronpedia else None,
        "code": SearchResult(origin.repo, origin.subfolder, origin.revision).code,
    }


def _l0(l0: float | None, kind: str | None) -> str | None:
    """Return the L0 in the index, and whether it is measured or the target of training."""
    how = "target of training" if kind == "target" else "measured"
    return None if l0 is None else f"{l0_text(l0, kind)} ({how})"


def _show_many(out: Output, location: Location, addresses: list[str]) -> None:
    """Print the SAEs in a repository, or in a folder of it."""
    rows = summary(location, addresses)
    found = {"repository": location.repo, "folder": location.subfolder or None, "commit": location.revision}
    stated = licence(location)
    named = ("addresses", "site", "d_sae")
    kinds = [{**dict(zip(named, kind, strict=True)), "saes": number} for kind, number in rows.items()]
    out.document({**found, **stated, "saes": len(addresses), "kinds": kinds, "addresses": addresses})
    facts = {name: value for name, value in found.items() if value}
    facts |= {"licence": stated["license"] or stated["license_evidence"] or "", "SAEs": f"{len(addresses):,}"}
    out.show(facts_grid(facts))
    table = Table(box=SIMPLE_HEAD)
    for name in ("addresses", "site"):
        table.add_column(name, overflow="fold")
    for name in ("latents", "SAEs"):
        table.add_column(name, justify="right")
    for (pattern, site, d_sae), number in list(rows.items())[:SHOWN_ROWS]:
        table.add_row(escape(pattern), site or "?", f"{d_sae:,}" if d_sae else "?", f"{number:,}")
    out.show(table)
    if len(rows) > SHOWN_ROWS:
        out.show(f"and {len(rows) - SHOWN_ROWS} more kinds.")
    shown = addresses[:SHOWN_ADDRESSES]
    left = f"\n  ... {len(addresses) - len(shown):,} more" if len(addresses) > len(shown) else ""
    out.show("Examples\n" + "\n".join(f"  {escape(address)}" for address in shown) + left)
    _show_code(out, location.repo, addresses[0], location.revision)


def summary(location: Location, addresses: list[str]) -> dict[tuple[str, str | None, int | None], int]:
    """Return the number of SAEs of each kind: pattern of the address, and site and width if they are known."""
    from ..catalog.hub_listing import CONTENTS, contents_of
    from ..formats import open_at
    from ..hub.index import known_at

    root = location.at("")
    listed = contents_of(root) if CONTENTS in root else {}
    kinds: Counter[tuple[str, str | None, int | None]] = Counter()
    for address in addresses:
        known = known_at(location.repo_id, address)
        stated = listed.get(address, {})
        if not known and not stated and len(addresses) <= OPENED:
            with suppress(SAEError):  # a broken one is still counted
                config = open_at(root.at(address)).config
                stated = {"site": config.site, "d_sae": config.d_sae}
        site = known.site if known else stated.get("site")
        d_sae = known.d_sae if known else stated.get("d_sae")
        masked = re.sub(r"\.\d+", ".*", site) if site else None
        kinds[_NUMBER.sub("*", address), masked, d_sae] += 1
    return dict(sorted(kinds.items(), key=lambda kind: (kind[0][0], kind[0][1] or "?", kind[0][2] or 0)))


def licence(location: Location) -> dict[str, str | None]:
    """Return the licence that the card or a file states (None if it is not known), and the evidence."""
    from ..publishing.stated_licence import stated_licence

    stated = stated_licence(location)
    return {"license": None if stated.name == "other" else stated.name, "license_evidence": stated.evidence}


def size_text(size: float) -> str:
    """Return a human-readable number of bytes.

    >>> size_text(302_000_000)
    '302 MB'
    """
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _show_code(out: Output, repo: str, subfolder: str, revision: str | None) -> None:
    """Print the code that loads an SAE from that commit, unless `quiet`."""
    from ..catalog.search_result import SearchResult
    from .search import code

    if not out.quiet:
        out.show("\n[bold]from hf_gated_sae import SAEModel[/]")
        line = code(SearchResult(repo, subfolder, revision), None, out.results.width)
        out.results.print(line, highlight=False, soft_wrap=True)
