"""Tiny random models of every model type of transformers, from its default configuration with small sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

DEPTH = 4  # blocks per model, or more to have two blocks of each kind
MOST_DEPTH = 8
LARGEST = 30_000_000  # parameters; a larger model has a size that is not in the table below

# Tiny values by name; the first matching pattern applies. Sizes that must agree do: 4 heads of 8 channels make 32.
_DEPTHS = r"(conf_)?num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_blocks|depth"
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab.*", 128),
    (r".*(key_value_heads|kv_heads)|kv_n_heads|num_query_groups", 2),
    (r".*heads(_per_.*)?|.*n_head", 4),
    (r"qk_head_dim|attention_head_dim", 16),
    (r".*(head_dim|headdim|head_size|d_head|dim_head)|d_kv|kv_channels", 8),
    (r"attention_hidden_size", 64),
    (r"rotary_dim", 4),
    (r"(backbone_|out_)?hidden_size(_global)?|d_model|n_embd|word_embed_proj_dim|lru_width|mamba_d_ssm", 32),
    (r"(.*_)?embed(ding)?_(dim|size)|emb_dim|(in|out)put_(embedding_)?size", 32),
    (r".*(intermediate|ffn|feed_forward).*|d_ff|dff|dim_ff|d_inner|mlp_dim|router_hidden_size|.*per_layer_input", 48),
    (r".*rank.*|d_rel|mamba_d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?expand|n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups|o_groups", 1),
    (r".*(experts_per_tok(en)?|top_?k|moe_k)", 2),
    (r".*experts|zero_expert_num|.*moe_num.*", 4),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r".*(period|every_n.*|interval|_step)|rescale_every|n_layers_per_.*", 2),
    (r".*offset|first_.*dense.*|num_dense_layers", 1),
    (r".*chunk_size|block_size|.*window.*|local_attention|token_budget", 16),
    (r"compress_ratio", 2),
    (r"prompt_length", 4),
    (r".*max.*(position|length|seq).*|n_positions|n_ctx|context_length", 64),
)
_TOKENS = {"pad": 0, "bos": 1, "eos": 2}
_OPEN: dict[str, Any] = {"layer_types": ["full_attention"] * DEPTH, "default_language": "en_XX"}
_NO_SIZES = ("id2label", "label2id")


def small_config(name: str, fill: bool = False, **changes: Any) -> PretrainedConfig:
    """Return a type's default configuration with tiny sizes; with `fill`, sizes that are None are set as well."""
    kind = CONFIG_MAPPING[name]
    values = {k: v for k, v in kind().to_dict().items() if k not in ("model_type", "transformers_version")}
    small = {key: value for key, value in _small(values, fill).items() if value != values.get(key)}
    return kind(**small | changes)


def _small(values: Mapping[str, Any], fill: bool) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
        if isinstance(value, dict) and key not in _NO_SIZES and not _by_layer(value):
            small[key] = _small(value, fill)
        elif value is None and fill:
            small[key] = _OPEN.get(key, size)
        elif isinstance(value, bool) or not isinstance(value, int):
            small[key] = value
        elif re.fullmatch(r".*_(token_)?(id|ids|index)", key):
            small[key] = _TOKENS.get(key[:3], 3 + value % 16) if value >= 0 else value
        elif re.fullmatch(_DEPTHS, key):
            small[key] = min(value, DEPTH)
        else:
            small[key] = value if size is None else min(value, size)
    if values.get("num_key_value_heads") and values["num_key_value_heads"] == values.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if (values.get("head_dim") or 0) >= sum(values.get(f"qk_{part}_head_dim") or 1e9 for part in ("nope", "rope")):
        small["head_dim"] = 16
    return small | _few_layers(values, fill)


def _by_layer(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def _few_layers(values: Mapping[str, Any], fill: bool) -> dict[str, Any]:
    """Return the settings that are listed by layer for a few of the layers, up to two of each kind."""
    depth = next((key for key, value in values.items() if re.fullmatch(_DEPTHS, key) and isinstance(value, int)), "")
    count = values.get(depth, 0)
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == count > 1}
    tables = {
        key: {int(layer): item for layer, item in value.items()}
        for key, value in values.items()
        if key not in _NO_SIZES and _by_layer(value)
    }
    named = {k: v for k, v in values.items() if isinstance(v, list) and re.search(r"(layers|ids|idxs)$", k)}
    named = {k: v for k, v in named.items() if k not in lists and all(isinstance(i, int) and i < count for i in v)}
    if not lists and not tables and not named:
        return {}
    kinds: dict[str, list[int]] = {}
    for layer in range(count):
        described = [value[layer] for value in lists.values()] + [layer in value for value in named.values()]
        described += [value.get(layer) for value in tables.values()]
        kinds.setdefault(repr(described), []).append(layer)
    chosen = [layer for layers in kinds.values() for layer in layers[:2]][:MOST_DEPTH]
    chosen += [layer for layer in range(count) if layer not in chosen][: max(0, DEPTH - len(chosen))]
    chosen.sort()
    few: dict[str, Any] = {depth: len(chosen)}
    few |= {key: [value[layer] for layer in chosen] for key, value in lists.items()}
    few |= {key: [new for new, old in enumerate(chosen) if old in value] for key, value in named.items()}
    for key, value in tables.items():
        few[key] = {new: _small(value[old], fill) for new, old in enumerate(chosen) if old in value}
    return few


def build(name: str) -> PreTrainedModel:
    """Build a tiny model of a type with random parameters; settings without a default are filled in if needed."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    reversible = {"is_decoder": True, "axial_pos_embds": False}
    attempts: tuple[dict[str, Any], ...] = ({}, {"fill": True}, {"rope_parameters": rope}, reversible)
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            return _build(name, attempt)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _build(name: str, changes: Mapping[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small_config(name, **changes)).parameters())
    if size > LARGEST:
        raise ValueError(f"the tiny model has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(name, **changes), dtype=torch.float32).eval()
    randomise(model)
    with torch.no_grad():
        model(input_ids=some_ids(), use_cache=False)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Set gains, biases, learned scales and matrices to large and different values, so that none agree by chance."""
    for name, parameter in model.named_parameters():
        if "A_log" in name or "dt_" in name or not parameter.is_floating_point():
            continue
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
        elif parameter.ndim < 2 or parameter.numel() == max(parameter.shape):
            parameter.uniform_(0.5, 1.5)
        elif "conv" not in name:
            parameter.normal_(std=min(parameter.shape[-2:]) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("scalar", "scale")) and buffer.numel() == 1 and buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)


def some_ids(batch: int = 3, sequence: int = 16) -> Tensor:
    """Return ids ``[batch, sequence]`` that are not special tokens in any default configuration."""
    return torch.arange(batch * sequence).mul(7).remainder(97).add(20).view(batch, sequence)
