"""Gemma Scope 2: JumpReLU, nothing subtracted from the input; affine transcoders add ``x @ A``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

JUMPRELU = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "trained_on_bos": False}
REPO = "google/gemma-scope-2"
EXPECTED = {
    f"{REPO}-1b-pt/resid_post/layer_1_width_16k_l0_medium": {
        **JUMPRELU, "site": "resid_post.1", "site_out": None, "base_model": "google/gemma-3-1b-pt", "d_in": 6
    },
    f"{REPO}-270m-pt/resid_post_all/layer_0_width_262k_l0_small": {
        **JUMPRELU, "site": "resid_post.0", "base_model": "google/gemma-3-270m"
    },
    f"{REPO}-1b-it/attn_out_all/layer_1_width_16k_l0_big": {
        **JUMPRELU, "site": "attn_z.1", "base_model": "google/gemma-3-1b-it"
    },
    f"{REPO}-4b-pt/mlp_out/layer_0_width_65k_l0_medium": {
        **JUMPRELU, "site": "mlp_out.0", "base_model": "google/gemma-3-4b-pt"
    },
    f"{REPO}-12b-it/attn_out/layer_1_width_1m_l0_small": {
        **JUMPRELU, "site": "attn_z.1", "base_model": "google/gemma-3-12b-it"
    },
    f"{REPO}-1b-pt/mlp_out_all/layer_1_width_16k_l0_small": {**JUMPRELU, "site": "mlp_out.1"},
    f"{REPO}-4b-it/transcoder/layer_0_width_16k_l0_big": {
        **JUMPRELU, "site": "mlp_in.0", "site_out": "mlp_out.0", "skip_connection": False,
        "base_model": "google/gemma-3-4b-it",
    },
    f"{REPO}-1b-pt/transcoder_all/layer_1_width_16k_l0_small_affine": {
        **JUMPRELU, "site": "mlp_in.1", "site_out": "mlp_out.1", "skip_connection": True
    },
    f"{REPO}-270m-pt/transcoder_all/layer_0_width_16k_l0_big_affine": {
        **JUMPRELU, "site": "mlp_in.0", "site_out": "mlp_out.0", "skip_connection": True,
        "base_model": "google/gemma-3-270m",
    },
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read ``params.safetensors`` and compute."""
    p = {name: value.astype(np.float64) for name, value in load_file(folder / "params.safetensors").items()}
    pre = x @ p["w_enc"] + p["b_enc"]
    latents = np.maximum(pre, 0) * (pre > p["threshold"])
    output = latents @ p["w_dec"] + p["b_dec"]
    if "affine_skip_connection" in p:
        output = output + x @ p["affine_skip_connection"]
    return latents, output
