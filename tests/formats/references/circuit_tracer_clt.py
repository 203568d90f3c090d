"""Circuit-tracer's cross-layer transcoders; layer l's decoder plane j writes the output of layer l + j."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

COMMON = {"architecture": "cross_layer", "site": None, "trained_on_bos": False, "normalization": "none"}
GEMMA, LLAMA = "mntss/clt-gemma-2-2b-2.5M", "mntss/clt-llama-3.2-1b-524k"
OUT = [f"mlp_out.{layer}" for layer in range(3)]
WHOLE = {**COMMON, "sites": [f"resid_mid.{layer}" for layer in range(3)], "sites_out": OUT, "d_sae": 33}
SECOND = {**COMMON, "sites": ["resid_mid.1"], "sites_out": OUT[1:], "d_sae": 11}
EXPECTED = {
    f"{GEMMA}/": {**WHOLE, "activation": "relu", "base_model": "google/gemma-2-2b"},
    f"{LLAMA}/": {**WHOLE, "activation": "jumprelu", "base_model": "meta-llama/Llama-3.2-1B"},
    f"{GEMMA}/W_enc_1.safetensors": {**SECOND, "activation": "relu"},
    f"{LLAMA}/W_enc_1.safetensors": {**SECOND, "activation": "jumprelu"},
    f"{GEMMA}/W_enc_2.safetensors": {**COMMON, "sites": ["resid_mid.2"], "sites_out": OUT[2:]},
}


def reference(place: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the layers and compute for ``x [tokens, sites, d]``; for a single layer, its own share and bias."""
    alone = re.fullmatch(r"W_enc_(\d)\.safetensors", place.name)
    folder = place.parent if alone else place
    layers = [int(alone[1])] if alone else range(3)
    parts, output = [], np.zeros((len(x), 3, x.shape[-1]))
    for read, layer in enumerate(layers):
        raw = {**load_file(folder / f"W_enc_{layer}.safetensors"), **load_file(folder / f"W_dec_{layer}.safetensors")}
        p = {name.removesuffix(f"_{layer}"): tensor.double().numpy() for name, tensor in raw.items()}
        pre = x[:, read] @ p["W_enc"].T + p["b_enc"]
        latents = pre * (pre > p["threshold"]) if "threshold" in p else np.maximum(pre, 0)
        parts.append(latents)
        for relative in range(p["W_dec"].shape[1]):
            output[:, layer + relative] += latents @ p["W_dec"][:, relative]
        output[:, layer] += p["b_dec"]
    return np.concatenate(parts, -1), output[:, layers[0] :]
