"""`hf-gated-sae info`: what an SAE, or a repository of them, is, without its weights; or what sites a model has."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import InputError, SAEError
from .app import app
from .tables import facts_grid, l0_text

if TYPE_CHECKING:
    from ..hub.index import KnownSAE
    from ..hub.location import Location
    from ..modeling.loading import Checkpoint

SHOWN_ROWS = 16
SHOWN_ADDRESSES = 6
OPENED = 24
"""Up to so many unknown SAEs are asked for their headers, a few small requests each."""
MISSED = ("base model", "site", "trained on BOS")
"""What a reader looks for, so that its absence is said."""
_NUMBER = re.compile(r"(?<![a-z]l)(?<!_l)\d+(?!\d*[km])")
"""What differs between addresses of a kind: not the name "l0", and not a width."""
UNITS = ("B", "kB", "MB", "GB", "TB")


@app.command()
def info(
    repo: Annotated[str | None, typer.Argument(help="Hub id, folder, or a release of the index.")] = None,
    subfolder: Annotated[str, typer.Argument(help="Folder or file of the SAE inside it.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Load this causal LM instead, and prove its sites.")
    ] = None,
) -> None:
    """Describe an SAE, or a repository of many, without downloading weights; or a model's sites, by loading it.

    Raises:
        InputError: unless exactly one of REPO and --model is given.
    """
    from ..hub.opening import open_at, place, sae_addresses  # here, so that --help does not wait for torch
    from .model_sites import show_sites

    if (repo is None) == (model is None):
        given = "neither" if repo is None else f"both, {repo} and --model {model}"
        raise InputError(
            "info describes the SAEs of one repository, 'hf-gated-sae info REPO', or the sites of one model, "
            f"'hf-gated-sae info --model MODEL'; it was given {given}."
        )
    console = Console()
    if repo is None:
        assert model is not None
        show_sites(console, model, revision)
        return
    location = place(repo, subfolder, revision=revision)
    addresses = sae_addresses(location)
    if location.address in addresses or len(addresses) < 2:
        if location.address not in addresses and addresses:
            location = location.at(addresses[0])
        _show_one(console, open_at(location), location)
    else:
        _show_many(console, location, addresses)


def _show_one(console: Console, checkpoint: Checkpoint, location: Location) -> None:
    """Print one SAE."""
    from ..hub.index import known_at, known_facts

    config, origin = checkpoint.config, checkpoint.origin
    shapes = checkpoint.shapes(config)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.stored.values()})
    neuronpedia = known_facts(location.repo_id, location.address).get("neuronpedia")
    base = f"{config.base_model}{f' @ {config.base_model_revision}' if config.base_model_revision else ''}"
    facts = {
        "repository": origin.repo,
        "address": origin.subfolder or None,
        "commit": origin.revision,
        "licence": licence(location),
        "layout": origin.format,
        "architecture": f"{config.architecture} ({checkpoint.model_class.__name__})",
        "base model": base if config.base_model else None,
        "site": ", ".join(config.sites_read),
        "writes to": ", ".join(config.sites_written) if config.sites_written != config.sites_read else None,
        "normalisation": config.normalization,
        "trained on BOS": {True: "yes", False: "no", None: None}[config.trained_on_bos],
        "latents": f"{config.d_sae:,}",
        "L0": _l0(known_at(location.repo_id, location.address)),
        "width": str(config.d_in) if config.d_in == config.d_out else f"{config.d_in} in, {config.d_out} out",
        "tensors": "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items()),
        "stored as": ", ".join(dtypes),
        "download": size_text(sum({id(t.source): t.source.size for t in checkpoint.stored.values()}.values())),
        "dashboards": f"https://www.neuronpedia.org/{neuronpedia}" if neuronpedia else None,
    }
    console.print(
        facts_grid({name: value or "not stated" for name, value in facts.items() if value or name in MISSED})
    )
    _show_code(console, origin.repo, origin.subfolder, origin.revision)


def _l0(known: KnownSAE | None) -> str | None:
    """Return the L0 that the index has, and how it is known."""
    if known is None or known.l0 is None:
        return None
    how = "what training aimed at" if known.l0_kind == "target" else "measured"
    return f"{l0_text(known.l0, known.l0_kind)} ({how})"


def _show_many(console: Console, location: Location, addresses: list[str]) -> None:
    """Print what a repository, or a folder of it, holds."""
    facts = {"repository": location.repo, "folder": location.subfolder, "commit": location.revision or ""}
    facts |= {"licence": licence(location), "SAEs": f"{len(addresses):,}"}
    console.print(facts_grid({name: value for name, value in facts.items() if value}))
    table = Table(box=SIMPLE_HEAD)
    for name in ("addresses", "site"):
        table.add_column(name, overflow="fold")
    for name in ("latents", "SAEs"):
        table.add_column(name, justify="right")
    rows = summary(location, addresses)
    for (pattern, site, latents), number in list(rows.items())[:SHOWN_ROWS]:
        table.add_row(escape(pattern), site, latents, f"{number:,}")
    console.print(table)
    if len(rows) > SHOWN_ROWS:
        console.print(f"and {len(rows) - SHOWN_ROWS} more kinds.", highlight=False)
    shown = addresses[:SHOWN_ADDRESSES]
    left = f"\n  ... {len(addresses) - len(shown):,} more" if len(addresses) > len(shown) else ""
    console.print("Such as\n" + "\n".join(f"  {escape(address)}" for address in shown) + left, highlight=False)
    _show_code(console, location.repo, addresses[0], location.revision)


def summary(location: Location, addresses: list[str]) -> Counter[tuple[str, str, str]]:
    """Return how many SAEs there are of each kind: pattern of the address, site and width as far as they are known."""
    from ..hub.index import known_at
    from ..hub.live import CONTENTS, contents_of
    from ..hub.opening import open_at

    root = location.at("")
    ours = contents_of(root) if CONTENTS in root else {}
    kinds: Counter[tuple[str, str, str]] = Counter()
    for address in addresses:
        known = known_at(location.repo_id, address)
        told = ours.get(address, {})
        if not known and not told and len(addresses) <= OPENED:
            with suppress(SAEError):  # a broken one is still counted
                config = open_at(root.at(address)).config
                told = {"site": config.site, "d_sae": config.d_sae}
        site = known.site if known else told.get("site")
        d_sae = known.d_sae if known else told.get("d_sae")
        masked = re.sub(r"\.\d+", ".*", site) if site else "?"
        kinds[_NUMBER.sub("*", address), masked, f"{d_sae:,}" if d_sae else "?"] += 1
    return Counter(dict(sorted(kinds.items())))


def licence(location: Location) -> str:
    """Return the licence that the card or a file states, or why it is not known."""
    from ..publishing.licence import stated_licence

    stated = stated_licence(location)
    return stated.name if stated.name not in (None, "other") else stated.evidence


def size_text(size: float) -> str:
    """Return a number of bytes for people.

    >>> size_text(302_000_000)
    '302 MB'
    """
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _show_code(console: Console, repo: str, subfolder: str, revision: str | None) -> None:
    """Print the code that loads an SAE, from that commit."""
    from ..hub.search import SearchResult
    from .search import code

    console.print("\nfrom hf_gated_sae import SAEModel", style="bold", highlight=False)
    console.print(code(SearchResult(repo, subfolder, revision), None, console.width), highlight=False, soft_wrap=True)
