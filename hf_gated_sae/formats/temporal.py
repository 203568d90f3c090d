"""Temporal SAEs (arXiv 2511.01836) in their authors' layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ..architectures.temporal import TemporalSAE, TemporalSAEConfig
from ..errors import CheckpointError
from ..hub import index
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint, Tensors
from ._config_values import flag, integer, mapping, one_of
from ._folders import folders_with, mapped_again
from ._saelens_sites import positive
from ._tensor_names import renamed
from .base import CheckpointFormat, Example

CONFIG = "conf.yaml"
WEIGHTS = "latest_ckpt.safetensors"
ATTENTION = {"query": "q_target", "key": "k_ctx", "value": "v_ctx", "output": "c_proj"}
MODELS = {"gemma-2-2b": "google/gemma-2-2b", "llama-3.1-8b": "meta-llama/Llama-3.1-8B"}
MOST_LAYERS = 64

_LAYER = re.compile(r"(?:^|/)layer_(\d+)(?:/|$)")


class TemporalFormat(CheckpointFormat):
    """Written by the authors of Temporal SAEs: ``conf.yaml`` and ``latest_ckpt.safetensors``.

    In folders ``<model>/layer_L/temporal/``, which name base model and block; the residual stream after block L is
    read. Tensors: ``D [d_sae, d_in]`` the decoder, ``E [d_in, d_sae]`` the encoder unless it is the decoder's
    transpose, ``b [d_in]`` (in early uploads ``[1, d_in]``), and ``attn_layers.{i}`` with ``q_target``, ``k_ctx``,
    ``v_ctx`` and ``c_proj``.

    Source: canrager/temporalSAEs.
    """

    name: ClassVar[str] = "temporal"
    files = (WEIGHTS,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files."""
        return folders_with(location, CONFIG, WEIGHTS)

    def claims(self, location: Location) -> bool:
        """Whether the folder has both files."""
        return location.file is None and CONFIG in location and WEIGHTS in location

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the attention from ``conf.yaml``, and the site from the folder's name."""
        where = f"{CONFIG} of {location}"
        conf = mapping(location.read_yaml(CONFIG), "sae", where)
        tied = flag(conf, "tied_weights", where)
        scale = positive(conf, "scaling_factor", where)
        settings = attention_settings(conf, where)
        names = {"W_dec": "D", "b_dec": "b", **({} if tied else {"W_enc_T": "E.T"})}
        stored = renamed(
            location.tensors(WEIGHTS),
            {**names, **attention_names(settings["attention_layers"])},
            f"{WEIGHTS} of {location}",
        )
        if tied:
            stored["W_enc_T"] = mapped_again(stored["W_dec"], location, WEIGHTS)
        d_sae, d_in = matrix_shape(stored["W_dec"].shape, where)
        layer = _LAYER.search(location.address)
        config = TemporalSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            site=f"resid_post.{int(layer[1])}" if layer else None,
            base_model=_base_model(location),
            scaling_factor=scale,
            **settings,
        )
        origin = location.origin(self.name, [CONFIG, WEIGHTS])
        return Checkpoint(TemporalSAE, config, origin, stored, finish=flat_bias)

    def examples(self, root: Path) -> list[Example]:
        """Write a tied SAE in bfloat16, and an untied one with two attention layers and a bias of early shape."""
        made = [
            (Example("canrager/temporalSAEs", "gemma-2-2B/layer_12/temporal"), True, torch.bfloat16, 6, 2, 0.05),
            (Example("canrager/temporalSAEs", "llama-3.1-8B/layer_15/temporal"), False, torch.float32, 7, 4, 0.029),
        ]
        for seed, (example, tied, dtype, d, heads, scale) in enumerate(made):
            s, layers, bottleneck = 24, seed + 1, seed + 1
            shapes = {"D": (s, d), "b": (d,) if tied else (1, d), **({} if tied else {"E": (d, s)})}
            for layer in range(layers):
                for name in ATTENTION.values():
                    width = s // bottleneck if name in ("q_target", "k_ctx") else s
                    shapes[f"attn_layers.{layer}.{name}.weight"] = (width, s)
                    shapes[f"attn_layers.{layer}.{name}.bias"] = (width,)
            generator = torch.Generator().manual_seed(seed)
            folder = root / example.repo / example.address
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / WEIGHTS)
            settings: dict[str, Any] = {"exp_factor": s / d, "n_heads": heads, "n_attn_layers": layers, "kval_topk": 5}
            settings |= {"bottleneck_factor": bottleneck, "sae_diff_type": "topk", "tied_weights": tied}
            conf = {"llm": {"dimin": d}, "data": {"dtype": str(dtype).removeprefix("torch.")}}
            conf["sae"] = {**settings, "scaling_factor": scale}
            (folder / CONFIG).write_text(yaml.safe_dump(conf))
        return [example for example, *_ in made]


def attention_settings(conf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration fields for attention and sparsity, from key names that SAELens uses, too.

    Raises:
        CheckpointError: if one is missing or cannot be used.
    """
    layers = integer(conf, "n_attn_layers", where)
    if not 0 <= layers <= MOST_LAYERS:
        raise CheckpointError(f"{where} has n_attn_layers = {layers}; expected 0 .. {MOST_LAYERS}.")
    kind = one_of(conf, "sae_diff_type", where, ("topk", "relu"))
    return {
        "heads": integer(conf, "n_heads", where),
        "attention_layers": layers,
        "bottleneck": integer(conf, "bottleneck_factor", where),
        "k": integer(conf, "kval_topk", where, None) if kind == "topk" else None,
    }


def attention_names(layers: int) -> dict[str, str]:
    """Return the name in the file of every attention parameter."""
    return {
        f"attention.{layer}.{name}.{part}": f"attn_layers.{layer}.{stored_name}.{part}"
        for layer in range(layers)
        for name, stored_name in ATTENTION.items()
        for part in ("weight", "bias")
    }


def matrix_shape(shape: tuple[int, ...], where: str) -> tuple[int, int]:
    """Return ``d_sae`` and ``d_in`` from the decoder's shape.

    Raises:
        CheckpointError: if it is not a matrix.
    """
    if len(shape) != 2:
        raise CheckpointError(f"The decoder beside {where} has shape {list(shape)}; expected [d_sae, d_in].")
    return shape[0], shape[1]


def flat_bias(tensors: Tensors) -> Tensors:
    """Remove the first axis of a bias ``[1, d_in]``."""
    bias: Tensor = tensors["b_dec"]
    tensors["b_dec"] = bias.reshape(-1) if bias.ndim == 2 and bias.shape[0] == 1 else bias
    return tensors


def _base_model(location: Location) -> str | None:
    """Return the base model in the index or in the folder's name, None if neither has it."""
    known = index.known_facts(location.repo_id, location.address).get("base_model")
    named = [MODELS[part] for part in location.address.lower().split("/") if part in MODELS]
    return known or (named[0] if named else None)
