"""Pointer sets: the transcoders that the configuration's URIs point to, by their own authors' equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from tests.formats.references import gemma_scope, gemma_scope_2, gemma_scope_2_cross_layer

TRANSCODER = {"architecture": "jumprelu", "trained_on_bos": False}
LAYERS = range(3)
EXPECTED = {
    f"mntss/gemma-scope-transcoders/layer_{layer}": {
        **TRANSCODER, "site": f"resid_mid.{layer}", "site_out": f"mlp_out.{layer}", "normalization": "rms_norm",
        "base_model": "google/gemma-2-2b",
    }
    for layer in range(2)
} | {
    "mwhanna/gemma-scope-2-1b-pt/transcoder_all/width_16k_l0_small_affine/layer_1": {
        **TRANSCODER, "site": "mlp_in.1", "site_out": "mlp_out.1", "skip_connection": True, "normalization": "none",
        "base_model": "google/gemma-3-1b-pt",
    },
    "mwhanna/gemma-scope-2-1b-pt/clt/width_262k_l0_medium": {
        "architecture": "cross_layer", "site": None, "base_model": "google/gemma-3-1b-pt",
        "sites": [f"mlp_in.{layer}" for layer in LAYERS], "sites_out": [f"mlp_out.{layer}" for layer in LAYERS],
    },
}  # fmt: skip


def reference(place: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follow the pointer to the repository beside this one."""
    whole = (place / "config.yaml").exists()
    folder = place if whole else place.parent
    uris = yaml.safe_load((folder / "config.yaml").read_text())["transcoders"]
    uri = uris[0 if whole else int(place.name.removeprefix("layer_"))]
    repositories = next(parent.parent for parent in folder.parents if parent.name in ("mntss", "mwhanna"))
    target = (repositories / uri.removeprefix("hf://")).parent
    if whole:
        return gemma_scope_2_cross_layer.reference(target, x)
    return (gemma_scope if "npz" in uri else gemma_scope_2).reference(target, x)
