"""SAELens 6, architecture by architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tests.formats.references.temporal import temporal

Array = np.ndarray
MINE = "acme/saelens-saes"
GEMMA, GPT2 = "google/gemma-2-2b", "openai-community/gpt2"
MLP = {"site": "resid_mid.3", "site_out": "mlp_out.3", "base_model": GEMMA, "apply_b_dec_to_input": False}
EXPECTED = {
    "acme/root-sae/": {
        "architecture": "standard", "site": "model.layers.4.output", "base_model": "meta-llama/Llama-3.2-1B",
        "normalization": "layer_norm", "trained_on_bos": False, "d_in": 6, "d_sae": 16,
    },
    f"{MINE}/gated/layer_2": {
        "architecture": "gated", "site": "resid_pre.2", "base_model": GPT2, "apply_b_dec_to_input": False,
        "trained_on_bos": None,
    },
    f"{MINE}/blocks.3.hook_resid_post": {
        "architecture": "jumprelu", "site": "resid_post.3", "base_model": GEMMA, "trained_on_bos": True
    },
    f"{MINE}/topk_k5:v1": {"architecture": "topk", "k": 5, "site": "attn_z.3", "normalization": "unit_norm"},
    f"{MINE}/topk.rescaled": {"architecture": "topk", "k": 5, "normalization": "none"},
    f"{MINE}/abstopk.pt": {"architecture": "abs_topk", "k": 5},
    f"{MINE}/abstopk.rescaled.pt": {"architecture": "abs_topk", "k": 5},
    f"{MINE}/pursuit": {
        "architecture": "matching_pursuit", "residual_threshold": 1.5 / 0.37, "max_iterations": 4,
        "normalization": "none", "stop_on_duplicate_support": True,
    },
    f"{MINE}/pursuit/plain": {"architecture": "matching_pursuit", "max_iterations": None, "residual_threshold": 0.0},
    f"{MINE}/temporal/tied": {"architecture": "temporal", "k": 4, "scaling_factor": 1.0, "heads": 2},
    f"{MINE}/temporal/untied": {"architecture": "temporal", "bottleneck": 2, "scaling_factor": 0.21},
    f"{MINE}/tc/relu": {**MLP, "architecture": "standard", "normalization": "rms_norm", "d_out": 5},
    f"{MINE}/tc/skip": {**MLP, "site": "mlp_in.3", "skip_connection": True, "normalization": "none", "d_out": 5},
    f"{MINE}/tc/jump": {**MLP, "architecture": "jumprelu", "normalization": "layer_norm", "d_out": 7},
    f"{MINE}/tc/jump_skip": {**MLP, "architecture": "jumprelu", "normalization": "rms_norm", "skip_connection": True},
    f"{MINE}/checkpoints/final_122880000": {"architecture": "jumprelu", "normalization": "none"},
    f"{MINE}/checkpoints/matryoshka": {"architecture": "jumprelu", "normalization": "none"},
}  # fmt: skip
SCALE = 0.37  # of the examples' activation_scaler.json


def reference(folder: Path, x: Array) -> tuple[Array, Array]:
    """Read the tensors with safetensors, and compute what SAELens's classes do."""
    cfg = json.loads((folder / "cfg.json").read_text())
    p = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    kind = cfg["architecture"]
    if "ln2.hook_normalized" in cfg["metadata"]["hook_name"]:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    raw = x
    rule, scale = cfg["normalize_activations"], 1.0
    if rule == "expected_average_only_in":
        rule, scale = "none", SCALE
    if kind == "temporal":
        bias = p["b_dec"] if cfg["apply_b_dec_to_input"] else 0 * p["b_dec"]
        encoder = p.get("W_enc", p["W_dec"].T)
        return temporal(x, p, p["W_dec"], encoder, bias, 2, 4, cfg.get("activation_normalization_factor", 1.0))
    given, back = normalised(x * scale, rule)
    centred = given - p["b_dec"] if cfg["apply_b_dec_to_input"] else given
    if kind == "matching_pursuit":
        latents = pursued(centred, p["W_dec"], cfg["residual_threshold"], cfg["max_iterations"] or x.shape[-1])
        bias = p["b_dec"] if cfg["apply_b_dec_to_input"] else 0
        # After SAELens's fold the latents of this tied SAE are in units of the raw activations.
        return latents / scale, (latents @ p["W_dec"] + bias) / scale
    norms = np.linalg.norm(p["W_dec"], axis=1)
    unit = norms if cfg.get("rescale_acts_by_decoder_norm") else np.ones_like(norms)
    latents = encoded(kind, centred, p, cfg.get("k"), unit)
    output = (latents / unit) @ p["W_dec"] + p["b_dec"]
    if "transcoder" in kind:
        return latents, output + (raw @ p["W_skip"].T if "skip" in kind else 0)
    return latents, back(output) / scale


def normalised(x: Array, rule: str) -> tuple[Array, Callable[[Array], Array]]:
    """Return the normalised activations, and the function that scales an output back."""
    if rule == "layer_norm":
        mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), lambda output: output * std + mean
    if rule == "constant_norm_rescale":
        c = np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)
        return x * c, lambda output: output / c
    assert rule == "none"
    return x, lambda output: output


def encoded(kind: str, x: Array, p: dict[str, Array], k: float | None, unit: Array | float = 1.0) -> Array:
    """Return the latents of all but the tied architectures."""
    if kind == "gated":
        gate = x @ p["W_enc"] + p["b_gate"] > 0
        return gate * np.maximum(x @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"], 0)
    pre = (x @ p["W_enc"] + p["b_enc"]) * unit
    if kind in ("topk", "abstopk"):
        rank = -np.abs(pre) if kind == "abstopk" else -pre
        kept = np.argsort(np.argsort(rank, axis=-1), axis=-1) < k
        return np.where(kept, pre if kind == "abstopk" else np.maximum(pre, 0), 0)
    if "batchtopk" in kind:
        return np.maximum(pre, 0) * (pre > float(p["topk_threshold"]))
    return np.maximum(pre, 0) * (pre > (p["threshold"] if "jumprelu" in kind else 0))


def pursued(x: Array, decoder: Array, threshold: float, iterations: int) -> Array:
    """Return the latents of a matching pursuit, for all tokens at once."""
    left, latents, done = x.copy(), np.zeros((len(x), len(decoder))), np.zeros(len(x), bool)
    tokens = np.arange(len(x))
    for _ in range(iterations):
        best = (left @ decoder.T).argmax(-1)
        value = np.maximum((left * decoder[best]).sum(-1), 0) * ~done
        support = latents != 0
        latents[tokens, best] += value
        left = left - value[:, None] * decoder[best]
        done |= ((latents != 0) == support).all(-1)
        if threshold > 0:
            done |= np.linalg.norm(left, axis=-1) < threshold
    return latents
