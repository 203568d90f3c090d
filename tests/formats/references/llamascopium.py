"""llamascopium: activation functions are applied to latents times decoder norms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

REPO = "acme/llama-3.1-8b-llamascopium"
COMMON = {
    **{"base_model": None, "site": "resid_post.1", "site_out": None, "d_in": 9, "d_sae": 18, "normalization": "none"},
    **{"apply_b_dec_to_input": False, "trained_on_bos": None},
}
TOPK = {**COMMON, "architecture": "topk", "k": 5, "rectified": True}
EXPECTED = {
    f"{REPO}/relu": {**COMMON, "architecture": "standard"},
    f"{REPO}/jumprelu": {**COMMON, "architecture": "jumprelu"},
    f"{REPO}/topk": {**TOPK, "rank_by_decoder_norm": True, "normalization": "unit_norm"},
    f"{REPO}/topk-unweighted": {**TOPK, "rank_by_decoder_norm": False},
    f"{REPO}/batchtopk": {**TOPK, "rank_by_decoder_norm": True},
    f"{REPO}/transcoder": {**COMMON, "architecture": "jumprelu", "site": "mlp_in.1", "site_out": "mlp_out.1"},
    f"{REPO}/glu": {**COMMON, "architecture": "glu"},
    f"{REPO}/glu-relu": {**COMMON, "architecture": "glu", "normalization": "unit_norm"},
}


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Set all but the k largest of every row to zero."""
    kept = np.zeros_like(values)
    for row, places in enumerate(np.argsort(-values, axis=-1)[:, :k]):
        kept[row, places] = values[row, places]
    return kept


def largest_of_batch(values: np.ndarray, k: int) -> np.ndarray:
    """Set all but the ``k * tokens`` largest of a batch to zero."""
    return largest(values.reshape(1, -1), k * len(values)).reshape(values.shape)


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalise, encode, weigh by decoder norms, activate, undo."""
    config = json.loads((folder / "config.json").read_text())
    raw = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    d = x.shape[-1]
    scale_in = scale_out = 1.0
    if config["norm_activation"] == "dataset-wise":
        ends = (config["hook_point_in"], config["hook_point_out"])
        scale_in, scale_out = (d**0.5 / raw[f"dataset_average_activation_norm.{hook}"] for hook in ends)
    if config["norm_activation"] == "token-wise":
        scale_in = scale_out = d**0.5 / np.linalg.norm(x, axis=-1, keepdims=True)
    x = x * scale_in
    pre = x @ raw["W_E"] + raw["b_E"]
    if config["use_glu_encoder"]:
        pre = pre / (1 + np.exp(-(x @ raw["W_E_glu"] + raw["b_E_glu"])))
    norms = np.linalg.norm(raw["W_D"], axis=1) if config["sparsity_include_decoder_norm"] else 1.0
    weighed = pre * norms
    if config["act_fn"] == "jumprelu":
        active = weighed * (weighed > np.exp(raw["activation_function.log_jumprelu_threshold"]))
    else:
        active = np.maximum(weighed, 0)
    if config["act_fn"] == "topk":
        active = largest(active, config["top_k"])
    if config["act_fn"] == "batchtopk":  # per token
        active = np.concatenate([largest_of_batch(token[None], config["top_k"]) for token in active])
    latents = active / norms
    return latents, (latents @ raw["W_D"] + raw.get("b_D", 0.0)) / scale_out
