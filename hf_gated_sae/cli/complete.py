"""Shell completion of arguments, without importing torch."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
SITES = ("resid_post", "resid_pre", "resid_mid", "mlp_out", "mlp_in", "mlp_neurons", "attn_out", "attn_in", "attn_z")


def sites(incomplete: str) -> list[str]:
    """Return the names of sites."""
    return _beginning(incomplete, SITES)


def architectures(incomplete: str) -> list[str]:
    """Return the names of architectures, which are those of their files."""
    return _beginning(incomplete, (module.name for module in pkgutil.iter_modules([str(PACKAGE / "architectures")])))


def presets(incomplete: str) -> list[str]:
    """Return the names of training presets, which are those of their files."""
    return _beginning(incomplete, (path.stem for path in (PACKAGE / "training" / "presets").glob("*.yaml")))


def releases(incomplete: str) -> list[str]:
    """Return the releases of the index, and their repositories."""
    known = _index()
    return _beginning(incomplete, [*known, *(release["repo"] for release in known.values())])


def base_models(incomplete: str) -> list[str]:
    """Return the base models of the index."""
    return _beginning(incomplete, filter(None, (release.get("base_model") for release in _index().values())))


def _index() -> dict[str, Any]:
    """Return the releases of the index's file; `hub.index` would import torch."""
    found: dict[str, Any] = json.loads((PACKAGE / "hub" / "known_saes.json").read_bytes())["releases"]
    return found


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
