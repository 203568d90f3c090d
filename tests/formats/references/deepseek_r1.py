"""qresearch: two linear layers with a ReLU between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

RELU = {"architecture": "standard", "apply_b_dec_to_input": False, "d_in": 7, "d_sae": 18, "normalization": "none"}
EXPECTED = {
    "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19/": {
        **RELU, "site": "resid_post.19", "base_model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    },
    "qresearch/Llama-3.2-1B-Instruct-SAE-l9/": {
        **RELU, "site": "resid_post.9", "base_model": "meta-llama/Llama-3.2-1B-Instruct"
    },
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the only file and compute."""
    [file] = folder.glob("*.pt")
    state = {name: value.double().numpy() for name, value in torch.load(file, weights_only=True).items()}
    latents = np.maximum(x @ state["encoder.weight"].T + state["encoder.bias"], 0)
    return latents, latents @ state["decoder.weight"].T + state["decoder.bias"]
