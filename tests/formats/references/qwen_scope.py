"""Qwen-Scope: the k largest pre-latents of a token, whatever their sign."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

COMMON = {
    **{"architecture": "topk", "apply_b_dec_to_input": False, "d_in": 7, "d_sae": 18, "trained_on_bos": False},
    **{"rectified": False, "rank_by_decoder_norm": False, "normalization": "none"},
}
LARGE, SMALL = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_10", "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_14"
EXPECTED = {
    f"{LARGE}/layer0.sae.pt": {**COMMON, "site": "resid_post.0", "k": 10, "base_model": "Qwen/Qwen3-8B-Base"},
    f"{LARGE}/layer11.sae.pt": {**COMMON, "site": "resid_post.11", "k": 10, "base_model": "Qwen/Qwen3-8B-Base"},
    f"{SMALL}/layer3.sae.pt": {**COMMON, "site": "resid_post.3", "k": 14, "base_model": "Qwen/Qwen3.5-27B"},
}


def reference(file: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the file and compute."""
    state = {name: value.double().numpy() for name, value in torch.load(file, weights_only=True).items()}
    latents = x @ state["W_enc"].T + state["b_enc"]
    k = int(re.search(r"L0_(\d+)", str(file))[1])
    for row in latents:
        row[np.argsort(row)[:-k]] = 0
    assert (latents < 0).any(), "an example without negative latents proves nothing"
    return latents, latents @ state["W_dec"].T + state["b_dec"]
