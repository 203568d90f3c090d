"""Gemma Scope 2's multi-layer SAEs: every source site against every output, with nothing masked."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

COMMON = {"architecture": "cross_layer", "activation": "jumprelu", "site": None, "trained_on_bos": False}
STREAM = [f"resid_post.{layer}" for layer in (1, 2, 4, 5)]
TRANSCODER = {
    "sites": [f"mlp_in.{layer}" for layer in range(3)],
    "sites_out": [f"mlp_out.{layer}" for layer in range(3)],
}
SECOND = {"sites": ["mlp_in.1"], "sites_out": ["mlp_out.1", "mlp_out.2"], "d_sae": 11}
EXPECTED = {
    "google/gemma-scope-2-1b-pt/clt/width_262k_l0_medium": {
        **COMMON, **TRANSCODER, "base_model": "google/gemma-3-1b-pt", "skip_connection": False, "d_sae": 33
    },
    "google/gemma-scope-2-270m-it/clt/width_262k_l0_big_affine": {
        **COMMON, **TRANSCODER, "base_model": "google/gemma-3-270m-it", "skip_connection": True, "is_transcoder": True
    },
    "google/gemma-scope-2-1b-it/crosscoder/layer_1_2_4_5_width_65k_l0_medium": {
        **COMMON, "sites": STREAM, "sites_out": STREAM, "latents_per_site": [10, 11, 12, 13], "is_transcoder": False
    },
    "google/gemma-scope-2-1b-pt/clt/width_262k_l0_medium/params_layer_1.safetensors": {
        **COMMON, **SECOND, "base_model": "google/gemma-3-1b-pt", "skip_connection": False
    },
    "google/gemma-scope-2-270m-it/clt/width_262k_l0_big_affine/params_layer_1.safetensors": {
        **COMMON, **SECOND, "base_model": "google/gemma-3-270m-it", "skip_connection": True
    },
    "google/gemma-scope-2-1b-it/crosscoder/layer_1_2_4_5_width_65k_l0_medium/params_layer_1.safetensors": {
        **COMMON, "sites": STREAM[1:2], "sites_out": STREAM[1:], "latents_per_site": [11]
    },
}  # fmt: skip


def reference(place: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the layers and compute for ``x [tokens, sites, d]``; for a single layer, its own share, bias and skip."""
    alone = re.fullmatch(r"params_layer_(\d)\.safetensors", place.name)
    folder = place.parent if alone else place
    sites = [int(alone[1])] if alone else list(range(x.shape[1]))
    parts, output = [], np.zeros((len(x), len(list(folder.glob("params_layer_*"))), x.shape[-1]))
    for read, site in enumerate(sites):
        raw = load_file(folder / f"params_layer_{site}.safetensors")
        p = {name: value.astype(np.float64) for name, value in raw.items()}
        pre = x[:, read] @ p["w_enc"] + p["b_enc"]
        latents = np.maximum(pre, 0) * (pre > p["threshold"])
        parts.append(latents)
        output += np.einsum("ts,sod->tod", latents, p["w_dec"])
        output[:, site] += p["b_dec"]
        if "affine_skip_connection" in p:
            output[:, site] += x[:, read] @ p["affine_skip_connection"]
    return np.concatenate(parts, -1), output[:, sites[0] :]
