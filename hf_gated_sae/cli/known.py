"""What `hf-gated-sae info` shows of SAEs that cannot be reached: their rows of the index."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape

from ..errors import SAEError
from .output import Output
from .search import code, record, table

SHOWN = 8


def show_known(out: Output, repo: str, subfolder: str, revision: str | None, why: SAEError) -> bool:
    """Print what the index knows of an SAE, or of the SAEs of a repository or release.

    Args:
        out: where to print.
        repo: repository, perhaps with ``@revision``, or release.
        subfolder: id, folder or file of the SAE in it.
        revision: branch, tag or commit that was asked for.
        why: what opening it raised, which is said beside.

    Returns:
        Whether the index knows any of it; if not, nothing was printed.
    """
    from ..catalog.index_search import search
    from ..hub.index import releases, resolve_alias

    name, _, named_revision = repo.partition("@")
    repository, address = resolve_alias(name, subfolder)
    release = releases().get(name)
    listed = None if release is None or name == repository else {sae.address for sae in release.saes.values()}
    found = [
        replace(result, revision=revision or named_revision or None)
        for result in search(live=False)
        if result.repo == repository
        and (listed is None or result.subfolder in listed)
        and (not address or f"{result.subfolder}/".startswith(f"{address}/"))
    ]
    if not found:
        return False
    short = str(why).partition(" (")[0].removesuffix(".")
    out.note(f"{escape(short)}. This is what the index knows:")
    out.document({"source": "index", "reason": str(why), "saes": [record(result) for result in found]})
    rows = found[:SHOWN]
    out.show(table(rows, with_model=True), "[bold]from hf_gated_sae import SAEModel[/]")
    for number, result in enumerate(rows, 1):
        out.results.print(code(result, number, out.results.width), highlight=False, soft_wrap=True)
    if len(found) > len(rows):
        out.note(f"and {len(found) - len(rows):,} more: hf-gated-sae search lists them.")
    return True
