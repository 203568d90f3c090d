"""Llama Scope R1: a threshold on latent times decoder norm, and activations in the units of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

COMMON = {
    **{"architecture": "jumprelu", "apply_b_dec_to_input": False, "trained_on_bos": False, "d_in": 16, "d_sae": 32},
    **{"base_model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "normalization": "none", "site_out": None},
}
EXPECTED = {
    "fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L1R": {**COMMON, "site": "resid_post.1"},
    "fnlp/Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L0R": {**COMMON, "site": "resid_post.0"},
}


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale, encode, gate by latent times decoder norm, decode, scale back."""
    config = json.loads((folder / "config.json").read_text())
    raw = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    scale = x.shape[-1] ** 0.5 / raw[f"dataset_average_activation_norm.{config['hook_point_in']}"]
    pre = (scale * x) @ raw["encoder.weight"].T + raw["encoder.bias"]
    score = pre
    if config["sparsity_include_decoder_norm"]:
        score = pre * np.linalg.norm(raw["decoder.weight"], axis=0)
    latents = pre * (score > np.exp(raw["log_jumprelu_threshold"]))
    return latents, (latents @ raw["decoder.weight"].T + raw["decoder.bias"]) / scale
