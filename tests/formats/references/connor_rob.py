"""Attention SAEs of GPT-2 small: ReLU on the concatenated heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_NAME = "lr1.20e-03_l1{}e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt"
_REPO = "ckkissane/attn-saes-gpt2-small-all-layers"
EXPECTED = {
    f"{_REPO}/gpt2-small_L0_Hcat_z_{_NAME.format('1.80')}": {
        "architecture": "standard", "site": "attn_z.0", "base_model": "openai-community/gpt2", "d_in": 12, "d_sae": 16,
        "apply_b_dec_to_input": True, "normalization": "none", "trained_on_bos": None,
    },
    f"{_REPO}/gpt2-small_L5_Hcat_z_{_NAME.format('1.00')}": {"site": "attn_z.5"},
}  # fmt: skip


def reference(file: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the file with torch and compute."""
    p = {name: value.double().numpy() for name, value in torch.load(file, weights_only=True).items()}
    latents = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    return latents, latents @ p["W_dec"] + p["b_dec"]
