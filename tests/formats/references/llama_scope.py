"""Llama Scope: the scales, then unit decoder norms, then one threshold, in the order in which the authors load it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

COMMON = {
    **{"architecture": "jumprelu", "apply_b_dec_to_input": False, "trained_on_bos": False},
    **{"base_model": "meta-llama/Llama-3.1-8B", "d_in": 16, "d_sae": 32, "d_out": 16},
}
EXPECTED = {
    "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L1R-8x": {
        **COMMON, "site": "resid_post.1", "site_out": None, "normalization": "none"
    },
    "fnlp/Llama3_1-8B-Base-LXA-8x/Llama3_1-8B-Base-L0A-8x": {**COMMON, "site": "attn_out.0", "site_out": None},
    "fnlp/Llama3_1-8B-Base-LXM-32x/Llama3_1-8B-Base-L1M-32x": {**COMMON, "site": "mlp_out.1", "site_out": None},
    "fnlp/Llama3_1-8B-Base-LXTC-8x/Llama3_1-8B-Base-L1TC-8x": {
        **COMMON, "site": "resid_mid.1", "site_out": "mlp_out.1", "normalization": "rms_norm",
        "normalization_eps": 1e-5,
    },
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardise, bring to unit decoder norm, and compute."""
    config = json.loads((folder / "hyperparams.json").read_text())
    raw = {name: value.double().numpy() for name, value in load_file(folder / "checkpoints/final.safetensors").items()}
    W_enc, b_enc, W_dec, b_dec = (
        raw[f"{part}.{kind}"] for part in ("encoder", "decoder") for kind in ("weight", "bias")
    )
    if config["hook_point_in"].endswith("ln2.hook_normalized"):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    average = config["dataset_average_activation_norm"]
    factor_in, factor_out = (config["d_model"] ** 0.5 / average[end] for end in ("in", "out"))
    b_enc, b_dec, W_dec = b_enc / factor_in, b_dec / factor_out, W_dec * factor_in / factor_out
    norms = np.linalg.norm(W_dec, axis=0)
    W_dec, W_enc, b_enc = W_dec / norms, W_enc * norms[:, None], b_enc * norms
    pre = x @ W_enc.T + b_enc
    latents = np.where(pre > config["jump_relu_threshold"], pre, 0.0)
    return latents, latents @ W_dec.T + b_dec
