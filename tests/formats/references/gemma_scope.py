"""Gemma Scope 1: JumpReLU, nothing subtracted from the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np

JUMPRELU = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "trained_on_bos": False, "d_sae": 16}
EXPECTED = {
    "google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71": {
        **JUMPRELU, "site": "resid_post.1", "base_model": "google/gemma-2-2b", "d_in": 6, "normalization": "none"
    },
    "google/gemma-scope-9b-it-res/layer_0/width_131k/average_l0_10": {
        **JUMPRELU, "site": "resid_post.0", "base_model": "google/gemma-2-9b-it"
    },
    "google/gemma-scope-2b-pt-mlp/layer_1/width_16k/average_l0_12": {**JUMPRELU, "site": "mlp_out.1"},
    "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": {**JUMPRELU, "site": "embed"},
    "google/gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104": {**JUMPRELU, "site": "attn_z.0"},
    "google/gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_6": {
        **JUMPRELU, "site": "resid_mid.1", "site_out": "mlp_out.1", "normalization": "rms_norm"
    },
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read ``params.npz`` with numpy and compute."""
    p = {name: value.astype(np.float64) for name, value in np.load(folder / "params.npz").items()}
    scale = 1.0
    if "embedding" in str(folder):  # trained on rows of the table; the model multiplies them by sqrt(d)
        scale = x.shape[-1] ** 0.5
    if "transcoders" in str(folder):  # the norm of the MLP's input, without its gain
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    pre = (x / scale) @ p["W_enc"] + p["b_enc"]
    latents = np.maximum(pre, 0) * (pre > p["threshold"])
    return latents, (latents @ p["W_dec"] + p["b_dec"]) * scale
