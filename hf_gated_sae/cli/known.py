"""Index entries of SAEs that cannot be reached, as shown by `hf-gated-sae info`."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape

from ..errors import SAEError
from .console_output import Output
from .search import code, record, table

SHOWN = 8


def show_known(out: Output, repo: str, subfolder: str, revision: str | None, why: SAEError) -> bool:
    """Print the index entries of an SAE, or of the SAEs of a repository or release.

    Args:
        out: to print to.
        repo: repository, possibly with ``@revision``, or release.
        subfolder: id, folder or file of the SAE in it.
        revision: requested branch, tag or commit.
        why: the error of opening it, which is printed as well.

    Returns:
        Whether the index has an entry; if not, nothing was printed.
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
    out.note(f"{escape(short)}. The index has:")
    out.document({"source": "index", "reason": str(why), "saes": [record(result) for result in found]})
    rows = found[:SHOWN]
    out.show(table(rows, with_model=True), "[bold]from hf_gated_sae import SAEModel[/]")
    for number, result in enumerate(rows, 1):
        out.results.print(code(result, number, out.results.width), highlight=False, soft_wrap=True)
    if len(found) > len(rows):
        out.note(f"and {len(found) - len(rows):,} more; list them with hf-gated-sae search.")
    return True
