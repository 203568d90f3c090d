"""A tiny GPT-2 and a SAELens SAE of it under the names of real ones, for code that users type."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoTokenizer

from hf_gated_sae.demo import bundled

from .mini_hub import MiniHub
from .tiny_models import tiny_model

MODELS = ("openai-community/gpt2", "gpt2")
SAE = "jbloom/GPT2-Small-SAEs-Reformatted"
HOOK = "blocks.8.hook_resid_pre"
D_IN, D_SAE, LAYERS = 32, 64, 10


def seed_gpt2_small(hub: MiniHub, folder: Path) -> None:
    """Put the model, under both of its names, and the SAE on a loopback Hub.

    Args:
        hub: the loopback Hub.
        folder: an empty folder to write the model into.
    """
    model = tiny_model("gpt2", n_layer=LAYERS, vocab_size=1024, n_positions=1024)
    model.config.n_ctx = model.config.n_positions  # the real one has n_ctx, which TransformerLens reads
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled.MODEL).save_pretrained(folder)
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in MODELS:
        hub.seed(name, files)
    torch.manual_seed(0)
    encoder = torch.randn(D_IN, D_SAE) / D_IN**0.5
    tensors = {
        "W_enc": encoder,
        "W_dec": encoder.T.contiguous(),
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
    }
    cfg = {
        **{"model_name": "gpt2-small", "hook_point": HOOK, "hook_point_layer": 8, "hook_name": HOOK, "hook_layer": 8},
        **{"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "prepend_bos": True},
        **{"architecture": "standard", "activation_fn_str": "relu", "context_size": 128},
        **{
            "normalize_activations": "none",
            "finetuning_scaling_factor": False,
            "dataset_path": "Skylion007/openwebtext",
        },
    }
    hub.seed(SAE, {f"{HOOK}/cfg.json": json.dumps(cfg), f"{HOOK}/sae_weights.safetensors": save(tensors)})
