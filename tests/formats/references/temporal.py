"""Temporal SAEs: one sequence, every token at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

Array = np.ndarray
EXPECTED = {
    "canrager/temporalSAEs/gemma-2-2B/layer_12/temporal": {
        "architecture": "temporal", "site": "resid_post.12", "base_model": "google/gemma-2-2b", "d_in": 6,
        "d_sae": 24, "k": 5, "heads": 2, "bottleneck": 1, "attention_layers": 1, "scaling_factor": 0.05,
    },
    "canrager/temporalSAEs/llama-3.1-8B/layer_15/temporal": {
        "site": "resid_post.15", "base_model": "meta-llama/Llama-3.1-8B", "d_in": 7, "heads": 4, "bottleneck": 2,
        "attention_layers": 2, "scaling_factor": 0.029,
    },
}  # fmt: skip


def reference(folder: Path, x: Array) -> tuple[Array, Array]:
    """Read tensors and configuration, and compute."""
    conf = yaml.safe_load((folder / "conf.yaml").read_text())["sae"]
    p = {name: value.double().numpy() for name, value in load_file(folder / "latest_ckpt.safetensors").items()}
    encoder = p.get("E", p["D"].T)
    return temporal(x, p, p["D"], encoder, p["b"].reshape(-1), conf["n_heads"], 5, conf["scaling_factor"])


def temporal(
    x: Array, p: dict[str, Array], D: Array, E: Array, b: Array, heads: int, k: int, scale: float
) -> tuple[Array, Array]:
    """Return the novel codes of a sequence ``[tokens, d]``, and the reconstruction from novel and predicted ones."""
    lam = 1 / (4 * x.shape[-1])
    left = x * scale - b
    tokens, predicted = len(x), np.zeros((len(x), len(D)))
    for layer in range(len([name for name in p if name.endswith("k_ctx.weight")])):

        def linear(name: str, values: Array, layer: int = layer) -> Array:
            return values @ p[f"attn_layers.{layer}.{name}.weight"].T + p[f"attn_layers.{layer}.{name}.bias"]

        z = np.maximum(lam * left @ E, 0)
        shifted = np.roll(z, 1, axis=0)
        shifted[0] = 0
        split = [values.reshape(tokens, heads, -1).transpose(1, 0, 2) for values in (
            linear("q_target", z), linear("k_ctx", shifted), linear("v_ctx", shifted)
        )]  # fmt: skip
        scores = split[0] @ split[1].transpose(0, 2, 1) / np.sqrt(split[0].shape[-1])
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ split[2]
        code = np.maximum(linear("c_proj", mixed.transpose(1, 0, 2).reshape(tokens, -1)), 0)
        written = code @ D
        rho = (written * left).sum(-1, keepdims=True) / (np.linalg.norm(written, axis=-1, keepdims=True) + 1e-6) ** 2
        predicted += rho * code
        left = left - rho * written
    novel = np.maximum(lam * left @ E, 0)
    novel = np.where(np.argsort(np.argsort(-novel, axis=-1), axis=-1) < k, novel, 0)
    return novel, ((novel + predicted) @ D + b) / scale
