"""Tiny random causal language models of many families, built from configurations: no download, milliseconds each.

All have hidden size 32, 3 layers and 97 tokens. Norm gains are spread around one and biases are not zero, so that a
test cannot pass by reading a neighbouring tensor that happens to be equal in a freshly initialised model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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
_MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

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
    "opt_post_norm": {
        "model_type": "opt",
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "do_layer_norm_before": False,
    },
    "openai-gpt": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "bert": {**_LLAMA_LIKE, "is_decoder": True},
    "roberta": {**_LLAMA_LIKE, "is_decoder": True},
    "roberta-prelayernorm": {**_LLAMA_LIKE, "is_decoder": True},
    "minimax": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        "head_dim": 8,
        "block_size": 16,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "full_attn_alpha_factor": 3.5,
        "linear_attn_beta_factor": 0.7,
        "mlp_alpha_factor": 1.5,
    },
    "doge": {**_LLAMA_LIKE, "keep_window_size": 16},
    "beam": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "rwkv": {
        "hidden_size": HIDDEN,
        "attention_hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "context_length": 256,
    },
    "gemma3": {
        "text_config": {**_COMMON, **_LLAMA_LIKE, "head_dim": 16, "sliding_window": 64},
        "vision_config": {
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
        },
        "image_token_index": 3,
        "boi_token_index": 4,
        "eoi_token_index": 5,
    },
    "gemma4_text": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "per_layer_config": {},
    },
    "granitemoehybrid": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        **_MAMBA_2,
        "shared_intermediate_size": 48,
        "residual_multiplier": 0.22,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "falcon_h1": {**_LLAMA_LIKE, **_MAMBA_2, "mamba_d_ssm": HIDDEN, "attention_out_multiplier": 0.6},
    "jamba": {
        **_LLAMA_LIKE,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "deepseek_v3": {
        **_LLAMA_LIKE,
        **_LATENT_ATTENTION,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "nemotron_h": {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "expand": 1,
        "chunk_size": 16,
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    },
    "bitnet": _LLAMA_LIKE,
    "exaone4": {
        **_LLAMA_LIKE,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox_japanese": {**_LLAMA_LIKE, "intermediate_multiple_size": 2},
    "deepseek_v4": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "q_lora_rank": 8,
        "o_lora_rank": 8,
        "o_groups": 1,
        "qk_rope_head_dim": 8,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "index_topk": 2,
        "sliding_window": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "recurrent_gemma": {
        **_LLAMA_LIKE,
        "lru_width": HIDDEN,
        "head_dim": 8,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}

TINY_NAMES: tuple[str, ...] = tuple(
    sorted(name for name, settings in _FAMILIES.items() if settings.get("model_type", name) in CONFIG_MAPPING)
)
"""The families that this transformers has."""


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
        elif name.endswith(("weight", "residual", "_scale")) and parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 2 and "A_log" not in name:
            parameter.normal_(std=min(parameter.shape) ** -0.5)
        elif parameter.ndim == 3 and "conv" not in name:
            parameter.normal_(std=HIDDEN**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: functools.partial(tiny_model, name) for name in TINY_NAMES}
