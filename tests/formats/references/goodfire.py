"""Goodfire: two linear layers, with a ReLU or a TopK between them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

RELU = {"architecture": "standard", "apply_b_dec_to_input": False, "d_in": 7, "d_sae": 18, "normalization": "none"}
TOPK = {**RELU, "architecture": "topk", "k": 5, "rectified": True, "base_model": "openai/gpt-oss-20b"}
EXPECTED = {
    "Goodfire/Llama-3.3-70B-Instruct-SAE-l50/": {
        **RELU, "site": "resid_post.50", "base_model": "meta-llama/Llama-3.3-70B-Instruct"
    },
    "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/": {
        **RELU, "site": "resid_post.19", "base_model": "meta-llama/Llama-3.1-8B-Instruct"
    },
    "Goodfire/Hackathon-gpt-oss-20b-SAE-l15/": {**TOPK, "site": "resid_post.15"},
    "Goodfire/Hackathon-gpt-oss-20b-SAE-l7/": {**TOPK, "site": "resid_post.7"},
    "Goodfire/Hackathon-gpt-oss-20b-SAE-l3/": {**TOPK, "site": "resid_post.3"},
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the only file and compute."""
    [file] = folder.glob("*.pt*")
    state = {name: value.double().numpy() for name, value in torch.load(file, weights_only=True).items()}
    latents = np.maximum(x @ state["encoder_linear.weight"].T + state.get("encoder_linear.bias", 0.0), 0)
    if match := re.search(r"_k(\d+)", file.name):
        for row in latents:
            row[np.argsort(row)[: -int(match[1])]] = 0
        return latents, latents @ state["decoder.weight"].T + state.get("decoder_bias", 0.0)
    return latents, latents @ state["decoder_linear.weight"].T + state["decoder_linear.bias"]
