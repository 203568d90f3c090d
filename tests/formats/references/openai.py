"""OpenAI's autoencoders: linear layers as torch stores them; TopK ones behind a layer norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_REPO = "acme/openai-gpt2-small/gpt2-small"
_ALL = {"base_model": "openai-community/gpt2", "d_sae": 16, "apply_b_dec_to_input": True, "trained_on_bos": None}
_TOPK = {**_ALL, "architecture": "topk", "k": 5, "normalization": "layer_norm"}
_RELU = {**_ALL, "architecture": "standard", "normalization": "none"}
EXPECTED = {
    f"{_REPO}/resid_post_mlp_v5_32k/autoencoders/8.pt": {**_TOPK, "site": "resid_post.8", "d_in": 6},
    f"{_REPO}/resid_post_attn_v5_128k/autoencoders/0.pt": {**_TOPK, "site": "resid_mid.0"},
    f"{_REPO}/resid_delta_attn_v5_32k/autoencoders/3.pt": {**_TOPK, "site": "attn_out.3"},
    f"{_REPO}/resid_delta_mlp_v4/autoencoders/1.pt": {**_RELU, "site": "mlp_out.1"},
    f"{_REPO}/mlp_post_act/autoencoders/11.pt": {**_RELU, "site": "mlp_neurons.11"},
}


def reference(file: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the file with torch and compute."""
    state = torch.load(file, weights_only=True)
    p = {name: value.double().numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}
    mean, std = 0.0, 1.0
    if state["activation"] == "TopK":
        mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]
    if state["activation"] == "TopK":
        pre = np.where(np.argsort(np.argsort(-pre, axis=-1), axis=-1) < state["activation.k"], pre, 0)
    latents = np.maximum(pre, 0)
    decoder = p["decoder.weight"].T if "decoder.weight" in p else p["decoder.linear.weight"]
    return latents, (latents @ decoder + p["pre_bias"]) * std + mean
