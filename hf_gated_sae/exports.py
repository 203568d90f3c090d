"""The names that users import from `hf_gated_sae`, and the module of each.

A new architecture or intervention is exported by its file: nothing here is edited. An architecture's file in
`architectures/` defines a class ``...SAE`` and its ``...SAEConfig``; a file in `interventions/` defines the class that
it is named after. Files are scanned, not imported, since importing them would import torch and transformers.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
FIXED = {
    "catalog": ("SAESet", "search"),
    "evaluation": ("evaluate",),
    "hooks": ("ActivationShards", "attach", "attribute", "capture", "harvest", "save_activations"),
    "interventions": ("InterventionPlan", "TokenIds"),
    "modeling": ("SAEConfig", "SAEModel", "SAEOutput"),
    "sites": ("Site", "resolve"),
}
"""Names that are not plug-ins, by module."""

_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)


@cache
def exported() -> dict[str, str]:
    """Return the module of each exported name, without importing anything.

    >>> exported()["GatedSAE"], exported()["ProjectOut"]
    ('architectures.gated', 'interventions.project_out')
    """
    found = {name: module for module, names in FIXED.items() for name in names}
    for file in _files("architectures"):
        found |= {name: f"architectures.{file.stem}" for name in _classes(file) if name.endswith(("SAE", "SAEConfig"))}
    for file in _files("interventions"):
        verb = "".join(part.capitalize() for part in file.stem.split("_"))
        if verb in _classes(file):
            found[verb] = f"interventions.{file.stem}"
    return found


def stub() -> str:
    """Return the text of ``__init__.pyi``, from which editors and type checkers learn the names."""
    lines = [
        f"from .{module} import {name} as {name}"
        for module, name in sorted((module, name) for name, module in exported().items())
    ]
    return "\n".join(
        [
            '"""Written by `make stub`; a test compares it with `hf_gated_sae.exports`."""',
            "",
            *lines,
            "",
            "__version__: str",
            "",
        ]
    )


def _files(room: str) -> list[Path]:
    return sorted(file for file in (PACKAGE / room).glob("*.py") if not file.name.startswith("_"))


def _classes(file: Path) -> list[str]:
    return _CLASS.findall(file.read_text(encoding="utf-8"))
