"""What `hf-gated-sae info --plugins` shows: everything that one file adds, of this package and of others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .console_output import Output


@dataclass(frozen=True)
class PluginKind:
    """One kind of plug-in.

    Attributes:
        title: plural, such as ``"architectures"``.
        group: entry-point group under which other packages offer such plug-ins; also the folder of ours.
        entries: the plug-ins by name.
    """

    title: str
    group: str
    entries: Mapping[str, Any]


def plugin_kinds() -> Iterator[PluginKind]:
    """Yield every kind of plug-in."""
    from ..architectures import architectures
    from ..formats import formats
    from ..interventions import interventions
    from ..sites.names import libraries
    from ..training.presets import presets
    from ..training.remedies import remedies
    from .app import app, load_commands

    for title, registry in (
        ("architectures", architectures),
        ("checkpoint layouts", formats),
        ("interventions", interventions),
        ("readers of other libraries' site names", libraries),
        ("remedies for dead latents", remedies),
    ):
        yield PluginKind(title, registry.package, registry)
    yield PluginKind("presets for training", "hf_gated_sae.training.presets", presets)
    load_commands()
    commands = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
    yield PluginKind("subcommands", "hf_gated_sae.cli", dict(sorted(commands.items())))


def module_of(kind: PluginKind, name: str) -> str:
    """Return the module that a plug-in comes from."""
    plugin = kind.entries[name]
    if kind.title.startswith("presets"):
        return f"{plugin.package}/{name}.yaml"
    if kind.title.startswith("readers"):
        plugin = plugin.meaning
    elif not inspect.isclass(plugin) and not inspect.isfunction(plugin):
        plugin = type(plugin)
    return str(plugin.__module__)


def about(plugin: Any) -> str:
    """Return the first line of what a plug-in says of itself."""
    stated = getattr(plugin, "title", None) or getattr(plugin, "description", None) or inspect.getdoc(plugin) or ""
    return str(stated).strip().partition("\n")[0]


def show_plugins(out: Output) -> None:
    """Print all plug-ins, kind by kind."""
    found = {
        kind.title: [
            {"name": name, "module": module_of(kind, name), "about": about(plugin)}
            for name, plugin in kind.entries.items()
        ]
        for kind in plugin_kinds()
    }
    for kind in plugin_kinds():
        table = Table(
            "name", "what it is", box=SIMPLE_HEAD, title=f"{kind.title} ({kind.group})", title_justify="left"
        )
        for row in found[kind.title]:
            theirs = "" if row["module"].startswith("hf_gated_sae") else f" [dim]({escape(row['module'])})[/dim]"
            table.add_row(escape(row["name"]), escape(row["about"].replace("``", "")) + theirs)
        out.show(table)
    out.document(found)
