"""sparsify: TopK, GroupMax and signed TopK, with and without transcoding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

LLAMA = {"base_model": "meta-llama/Meta-Llama-3-8B", "d_in": 6, "d_sae": 18, "normalization": "none"}
PYTHIA = {"base_model": "EleutherAI/pythia-70m", "base_model_revision": "step3000"}
EXPECTED = {
    "EleutherAI/sae-llama-3-8b-32x/layers.10": {
        **LLAMA, "architecture": "topk", "site": "resid_post.10", "apply_b_dec_to_input": True, "k": 3
    },
    "EleutherAI/sae-llama-3-8b-32x/layers.10.mlp": {
        **LLAMA, "architecture": "abs_topk", "site": "layers.10.mlp.output", "site_out": None, "k": 2
    },
    "EleutherAI/sae-llama-3-8b-32x/embed_tokens": {**LLAMA, "architecture": "topk", "site": "embed_tokens.output"},
    "EleutherAI/sae-llama-3-8b-32x/best/layers.10/layers.10": {**LLAMA, "site": "resid_post.10"},
    "EleutherAI/sae-pythia-70m-32k/layers.3/seed1": {
        **PYTHIA, "architecture": "group_max", "site": "resid_post.3", "groups": 3
    },
    "EleutherAI/sae-pythia-70m-32k/layers.3.attention/seed12": {**PYTHIA, "site": "layers.3.attention.output"},
    "EleutherAI/sae-pythia-70m-32k/layers.4.mlp": {
        **PYTHIA, "site": "layers.4.mlp.input", "site_out": "layers.4.mlp.output", "apply_b_dec_to_input": False
    },
    "EleutherAI/sae-pythia-70m-32k/layers.4": {
        **PYTHIA, "site": "resid_pre.4", "site_out": "resid_post.4", "skip_connection": True
    },
    "EleutherAI/skip-transcoder-pythia-70m/layers.5.mlp": {
        **PYTHIA, "site": "layers.5.mlp.input", "site_out": "layers.5.mlp.output", "apply_b_dec_to_input": True
    },
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read both files and compute."""
    config = json.loads((folder / "cfg.json").read_text())
    p = {name: value.astype(np.float64) for name, value in load_file(folder / "sae.safetensors").items()}
    k = config["k"]
    pre = (x if config.get("transcode") else x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
    if config.get("signed"):
        latents = pre * (np.abs(pre) >= np.sort(np.abs(pre), axis=-1)[:, -k, None])
    elif config.get("activation") == "groupmax":
        groups = np.maximum(pre, 0).reshape(len(x), k, -1)
        latents = (groups * (groups == groups.max(-1, keepdims=True))).reshape(pre.shape)
    else:
        positive = np.maximum(pre, 0)
        latents = positive * (positive >= np.sort(positive, axis=-1)[:, -k, None])
    skip = x @ p["W_skip"].T if "W_skip" in p else 0
    return latents, latents @ p["W_dec"] + p["b_dec"] + skip
