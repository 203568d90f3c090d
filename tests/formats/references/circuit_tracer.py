"""Circuit-tracer's per-layer transcoders; a TopK keeps raw values, a JumpReLU clamps nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

COMMON = {"apply_b_dec_to_input": False, "trained_on_bos": False}
RAW = {**COMMON, "site": "resid_mid.1", "site_out": "mlp_out.1", "normalization": "none"}
GAINED = {**COMMON, "site": "mlp_in.1", "site_out": "mlp_out.1", "normalization": "none"}
FILE = "layer_1.safetensors"
EXPECTED = {
    f"mntss/transcoder-Llama-3.2-1B/{FILE}": {
        **RAW, "architecture": "standard", "base_model": "meta-llama/Llama-3.2-1B", "skip_connection": True, "d_in": 7
    },
    f"mwhanna/qwen3-0.6b-transcoders-lowl0/{FILE}": {
        **GAINED, "architecture": "standard", "base_model": "Qwen/Qwen3-0.6B", "skip_connection": False
    },
    f"mwhanna/qwen3-14b-transcoders/{FILE}": {**GAINED, "architecture": "standard", "base_model": "Qwen/Qwen3-14B"},
    f"facebook/crv-8b-instruct-transcoders/{FILE}": {
        **GAINED, "architecture": "topk", "k": 128, "base_model": "meta-llama/Llama-3.1-8B-Instruct"
    },
    f"acme/gemma-transcoders/{FILE}": {
        **COMMON, "architecture": "jumprelu", "site": "resid_mid.1", "site_out": "mlp_out.1",
        "normalization": "rms_norm", "base_model": "google/gemma-2-2b", "skip_connection": True,
    },
    f"acme/topk-transcoders/run/7/{FILE}": {
        **RAW, "architecture": "topk", "k": 3, "base_model": "openai-community/gpt2"
    },
    f"acme/june-transcoders/{FILE}": {**RAW, "architecture": "standard", "d_sae": 16},
}  # fmt: skip


def reference(file: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read one layer and compute."""
    p = {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    where = str(file)
    if "gemma" in where:  # the norm of the MLP's input, without its gain
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    if "june" in where:
        p["W_dec"] = p["W_dec"].T
    pre = x @ p["W_enc"].T + p["b_enc"]
    if "crv" in where or "topk" in where:
        kept = torch.from_numpy(pre).topk(128 if "crv" in where else 3).indices.numpy()
        latents = np.zeros_like(pre)
        np.put_along_axis(latents, kept, np.take_along_axis(pre, kept, -1), -1)
    elif "activation_function.threshold" in p:
        latents = pre * (pre > p["activation_function.threshold"])
    else:
        latents = np.maximum(pre, 0)
    output = latents @ p["W_dec"] + p["b_dec"]
    return latents, output + x @ p["W_skip"].T if "W_skip" in p else output
