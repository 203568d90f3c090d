"""The proven sites of a model, as shown by `hf-gated-sae info --model`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..errors import InputError, SiteError
from .console_output import Output
from .tables import facts_grid

if TYPE_CHECKING:
    from ..sites import SiteMap, SiteRow


def show_sites(out: Output, name: str, revision: str | None) -> None:
    """Load a causal LM, prove its sites, and print them.

    Args:
        out: to print to.
        name: repository on the Hub, or folder.
        revision: branch, tag or commit.

    Raises:
        InputError: if the model cannot be loaded.
        SiteError: if a forward of the model raises.
    """
    from ..sites import resolve

    with out.bars():
        model = _load(name, revision)
    sites = resolve(model)
    rows = sites.rows()
    facts = _facts(name, model, sites, rows)
    out.document({**facts, "sites": rows})
    out.show(facts_grid(facts), *([table(rows)] if rows else []))
    example = next((row for row in reversed(rows) if row.proven and row.layers), None)
    if example is not None and not out.quiet:
        call = f'capture(model, "{example.name}.{example.layers[-1]}", **batch)'
        out.show("[bold]from hf_gated_sae import capture[/]")
        out.results.print(call, highlight=False, soft_wrap=True)


def table(rows: Sequence[SiteRow]) -> Table:
    """Return a table of the sites, each with its tensor in the model or the reason why it is refused."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # module paths need all of 80 columns
    made.add_column("site", no_wrap=True)
    made.add_column("layers", overflow="fold")
    made.add_column("tensor", overflow="fold")
    made.add_column("width", justify="right", no_wrap=True)
    for row in rows:
        tensor = row.tensor_path if row.proven else f"refused: {row.reason}"
        style = None if row.proven else "dim"
        name = f"{row.name}.L" if row.layers else row.name
        made.add_row(
            name, layers_text(row.layers), escape(tensor), f"{row.width:,}" if row.proven else "", style=style
        )
    return made


def layers_text(layers: Sequence[int]) -> str:
    """Return layers as a list of ranges.

    >>> layers_text([0, 1, 2, 5, 7, 8])
    '0..2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _load(name: str, revision: str | None) -> Any:
    """Return the model, loaded by transformers in the dtype of its checkpoint.

    Raises:
        InputError: if that fails, or the name is a path of a folder that does not exist.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if (folder.is_absolute() or name.startswith(".")) and not folder.is_dir():
        raise InputError(
            f"--model {name!r} cannot be loaded by AutoModelForCausalLM: there is no folder {folder}; give an "
            "existing folder, or the Hub id of a model."
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto").eval()
    except Exception as error:  # transformers raises errors of many types for broken files
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise InputError(
            f"--model {name!r} cannot be loaded by AutoModelForCausalLM ({reason}); give the Hub id or the folder of "
            "a causal language model."
        ) from error


def _norms(sites: SiteMap, rows: Sequence[SiteRow]) -> str:
    """Return the transforms that ``norm_no_gain`` resolves to, each with its sites."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        for layer in row.layers if row.proven else ():
            with suppress(SiteError):  # no norm reads it
                [plain] = sites[f"{row.name}.{layer}|norm_no_gain"].tensor_path.transforms
                found.setdefault(str(plain), {}).setdefault(row.name, []).append(layer)
    lines = []
    for transform, names in found.items():
        at = ", ".join(f"{name}.L ({layers_text(sorted(layers))})" for name, layers in names.items())
        lines.append(f"{transform} at {at}")
    return "\n".join(lines) or "no norm could be proven"


def _facts(name: str, model: Any, sites: SiteMap, rows: Sequence[SiteRow]) -> dict[str, str]:
    """Return the facts about the model as a whole, by label."""
    parallel = [row for row in rows if row.name == "resid_mid" and not row.proven]
    sequential = [layer for row in rows if row.name == "resid_mid" and row.proven for layer in row.layers]
    layout = [f"sequential in {layers_text(sequential)}"] if sequential else []
    layout += [f"no resid_mid in {layers_text(row.layers)}: {row.reason}" for row in parallel]
    return {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": f"{sites.n_layers}, found by {sites.evidence}" if sites.n_layers else f"not found: {sites.evidence}",
        "layout": "\n".join(layout) or "unknown",
        "norm_no_gain": _norms(sites, rows),
    }
