"""SAELens 2 to 5: a flat configuration; some facts are in SAELens's own registry and in no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tests.formats.references.saelens import encoded, normalised

MINE = "acme/saelens-saes"
GPT2 = "openai-community/gpt2"
EXPECTED = {
    "acme/gemma-2b-residual/gemma_2b_blocks.1.hook_resid_post_16384_anthropic": {
        "architecture": "standard", "site": "resid_post.1", "base_model": "google/gemma-2b", "trained_on_bos": True,
        "apply_b_dec_to_input": True, "normalization": "none", "d_in": 6, "d_sae": 16,
    },
    "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre": {
        "architecture": "standard", "site": "resid_pre.2", "base_model": GPT2, "normalization": "center",
        "trained_on_bos": True,
    },
    "tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1": {
        "site": "mlp_out.0", "base_model": GPT2, "normalization": "center", "trained_on_bos": None,
    },
    "JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8": {
        "site": "resid_pre.8", "base_model": "mistralai/Mistral-7B-v0.1", "normalization": "unit_norm"
    },
    "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_0.pt": {
        "architecture": "topk", "k": 5, "normalization": "layer_norm", "base_model": GPT2
    },
    "ctigges/pythia-70m-deduped__att-sm_processed/0-att-sm": {
        "site": "attn_out.0", "base_model": "EleutherAI/pythia-70m-deduped", "normalization": "center"
    },
    f"{MINE}-4/gated": {"architecture": "gated", "site": "resid_post.3", "trained_on_bos": None},
    f"{MINE}-5/jump": {"architecture": "jumprelu", "base_model": "google/gemma-2-2b", "trained_on_bos": None},
    f"{MINE}-5/topk": {"architecture": "topk", "k": 5, "normalization": "none", "trained_on_bos": True},
    f"{MINE}-3/tanh": {"architecture": "tanh_relu", "site": "resid_pre.2"},
    f"{MINE}-3/tuned": {"architecture": "standard", "normalization": "none"},
    "acme/legacy-root/": {"architecture": "standard", "site": "mlp_out.2", "normalization": "none"},
}  # fmt: skip

CENTRED = ("GPT2-Small-SAEs-Reformatted", "gpt2-small-mlp-out-saes", "pythia-70m-deduped__att-sm")
INPUT_SCALE = {"gpt2-small-mlp-out-saes": 1.049317316132615}


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the tensors, and from the path what only the registry says."""
    cfg = json.loads((folder / "cfg.json").read_text())
    p = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    place, mean = str(folder), 0.0
    if any(name in place for name in CENTRED):  # the base model was loaded with centred writing weights
        mean = x.mean(-1, keepdims=True)
    rule = "constant_norm_rescale" if "Mistral" in place else cfg.get("normalize_activations", "none")
    scale = next((value for name, value in INPUT_SCALE.items() if name in place), 1.0)
    assert (scale == 1.0) == (rule is not True)
    given, back = normalised((x - mean) * scale, "none" if rule is True else rule)
    activation = cfg.get("activation_fn_str", "relu")
    kind = "topk" if activation == "topk" else cfg.get("architecture", "standard")
    latents = encoded(kind, given - p["b_dec"], p, (cfg.get("activation_fn_kwargs") or {}).get("k"))
    if activation == "tanh-relu":
        latents = np.tanh(latents)
    factors = p["scaling_factor"] if cfg.get("finetuning_scaling_factor") else 1.0
    return latents, back((latents * factors) @ p["W_dec"] + p["b_dec"]) / scale + mean
