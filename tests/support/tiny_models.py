"""Tiny random causal language models of many families, built from configurations: no download, milliseconds each.

All have hidden size 32, 3 layers and 97 tokens. Norm gains are spread around one and biases are not zero, so that a
test cannot pass by reading a neighbouring tensor that happens to be equal in a freshly initialised model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

HIDDEN = 32
LAYERS = 3
VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Each family: the transformers model type (where it is not the name) and what differs from the common part.
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 256,
    },
    "gpt_neox": _LLAMA_LIKE,
    "gptj": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "falcon": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "falcon_new": {
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "mpt": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 256},
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 64},
    "mixtral": {**_LLAMA_LIKE, **_EXPERTS},
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 64},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 64},
    "phi": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "glm4": {**_LLAMA_LIKE, "head_dim": 8},
    "granite": {**_LLAMA_LIKE, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "gpt_oss": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16, "sliding_window": 64},
    "llama4_text": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
    },
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8, "time_step_rank": 4},
    "recurrent_gemma": {
        **_LLAMA_LIKE,
        "lru_width": HIDDEN,
        "head_dim": 8,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}

TINY_NAMES: tuple[str, ...] = tuple(sorted(_FAMILIES))


@functools.lru_cache(maxsize=256)
def _config(name: str, overrides: tuple[tuple[str, Any], ...]) -> PretrainedConfig:
    settings = {**_COMMON, **_FAMILIES[name], **dict(overrides)}
    return AutoConfig.for_model(settings.pop("model_type", name), **settings)


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a fresh tiny model of one family, in eval mode and float32.

    Args:
        name: one of `TINY_NAMES`.
        seed: seed of all parameters; the global random state is left as it was.
        overrides: configuration values that replace the family's own; must be hashable.

    Returns:
        The model.
    """
    config = _config(name, tuple(sorted(overrides.items())))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).eval()
        randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Spread norm gains over 0.5 .. 1.5, make biases non-zero and matrices large enough to matter, in place."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
        elif name.endswith("weight") and parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 2 and "A_log" not in name:
            parameter.normal_(std=min(parameter.shape) ** -0.5)
        elif parameter.ndim == 3 and "conv" not in name:
            parameter.normal_(std=HIDDEN**-0.5)


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: functools.partial(tiny_model, name) for name in TINY_NAMES}
