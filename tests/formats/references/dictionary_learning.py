"""dictionary_learning: seven classes, each with its own names and signs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

SAEBENCH = "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108"
PYTHIA = "canrager/lm_sae"
RUN = f"{PYTHIA}/pythia70m_sweep_standard_ctx128_0712"
CHAT = "andyrdt/saes-llama-3.1-8b-instruct"
GEMMA = {"base_model": "google/gemma-2-2b", "d_sae": 16, "normalization": "none", "skip_connection": False}
SMALL = {"base_model": "EleutherAI/pythia-70m-deduped", "d_sae": 16}
LLAMA = {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "architecture": "batch_topk", "k": 3}
EXPECTED = {
    f"{SAEBENCH}/gemma-2-2b_standard_new/resid_post_layer_12/trainer_0": {
        **GEMMA, "architecture": "standard", "site": "resid_post.12", "apply_b_dec_to_input": True
    },
    f"{RUN}/resid_pre_layer_4/trainer_1": {
        **SMALL, "architecture": "standard", "site": "resid_pre.4", "apply_b_dec_to_input": False
    },
    f"{RUN}/mlp_out_layer_3/trainer_2": {**SMALL, "architecture": "gated", "site": "mlp_out.3"},
    f"{RUN}/attn_out_layer_3/trainer_0": {**SMALL, "architecture": "topk", "site": "attn_out.3", "k": 3},
    f"{RUN}/resid_post_layer_4/trainer_7": {**SMALL, "architecture": "topk", "site": "resid_post.4", "k": 3},
    f"{CHAT}/resid_post_layer_11/trainer_1": {**LLAMA, "site": "resid_post.11"},
    f"{CHAT}/resid_post_layer_11_checkpoints/trainer_1_step_10": {**LLAMA, "site": "resid_post.11"},
    f"{SAEBENCH}/gemma-2-2b_matryoshka_batch_top_k/resid_post_layer_12/trainer_0": {
        **GEMMA, "architecture": "batch_topk", "site": "resid_post.12", "k": 3
    },
    f"{SAEBENCH}/gemma-2-2b_jump_relu/resid_post_layer_5/trainer_3": {
        **GEMMA, "architecture": "jumprelu", "site": "resid_post.5", "apply_b_dec_to_input": False
    },
    f"{PYTHIA}/interrupted/resid_post_layer_4/trainer_0": {**SMALL, "architecture": "gated", "site": "resid_post.4"},
    f"{PYTHIA}/interrupted/resid_post_layer_5/trainer_0": {**SMALL, "site": "resid_post.5"},
    f"{PYTHIA}/steps/resid_post_layer_4/trainer_0/checkpoints/ae_0.pt": {**SMALL, "site": "resid_post.4"},
    f"{PYTHIA}/steps/resid_post_layer_4/trainer_0/checkpoints/ae_100.pt": {**SMALL, "site": "resid_post.4"},
    f"{PYTHIA}/transcoder/mlp_layer_2/trainer_0": {**SMALL, "site": "mlp_in.2", "site_out": "mlp_out.2"},
    f"{PYTHIA}/transcoder/gemma_mlp/trainer_0": {
        "base_model": "google/gemma-2-2b", "site": "mlp_in.2", "site_out": "layers.2.mlp.output"
    },
    f"{PYTHIA}/inputs/trainer_0": {**SMALL, "site": "resid_pre.2", "site_out": None},
}  # fmt: skip


def reference(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load the pickle and compute; a backup's SAE reads ``x / norm_factor``, and its results are scaled back."""
    file = folder if folder.suffix == ".pt" else folder / "ae.pt"
    home = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    kind = json.loads((home / "config.json").read_text())["trainer"]["dict_class"]
    content = torch.load(file, weights_only=True)
    scale = content.get("norm_factor", 1.0)
    p = {name: value.double().numpy() for name, value in content.get("ae", content).items()}
    latents, output = equations(kind, p, x / scale)
    return latents * scale, output * scale


def equations(kind: str, p: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute what one of the library's classes does."""
    relu = lambda z: np.maximum(z, 0)  # noqa: E731
    if kind == "AutoEncoder":
        latents = relu((x - p["bias"]) @ p["encoder.weight"].T + p["encoder.bias"])
        output = latents @ p["decoder.weight"].T + p["bias"]
        return latents * np.linalg.norm(p["decoder.weight"], axis=0), output
    if kind == "AutoEncoderNew":
        latents = relu(x @ p["encoder.weight"].T + p["encoder.bias"])
        return latents, latents @ p["decoder.weight"].T + p["decoder.bias"]
    if kind == "GatedAutoEncoder":
        common = (x - p["decoder_bias"]) @ p["encoder.weight"].T
        latents = (common + p["gate_bias"] > 0) * relu(np.exp(p["r_mag"]) * common + p["mag_bias"])
        return latents, latents @ p["decoder.weight"].T + p["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        pre = x @ p["W_enc"] + p["b_enc"]
        latents = relu(pre * (pre > p["threshold"]))
        return latents, latents @ p["W_dec"] + p["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        positive = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        latents = positive * (positive > p["threshold"])
        return latents, latents @ p["W_dec"] + p["b_dec"]
    positive = relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
    if kind == "BatchTopKSAE":
        latents = positive * (positive > p["threshold"])
    else:
        latents = positive * (positive >= np.sort(positive, axis=-1)[:, -3:-2])
    return latents, latents @ p["decoder.weight"].T + p["b_dec"]
