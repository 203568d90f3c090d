"""Llama Scope R1 (OpenMOSS 2025): SAEs for DeepSeek-R1-Distill-Llama-8B, and others by that version of the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ._config_values import flag, text
from ._folders import folders_with
from ._openmoss import AVERAGE, base_model_of, checkpoint_as_trained
from ._tensor_names import renamed
from .base import CheckpointFormat, Example

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
NAMES = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_R1 = re.compile(r"Llama-Scope-R1-Distill", re.IGNORECASE)


class LlamaScopeR1Format(CheckpointFormat):
    """Written by the OpenMOSS team's library in 2025: ``config.json`` and ``sae_weights.safetensors``.

    The weights are linear layers and ``log_jumprelu_threshold [d_sae]``, which is compared with ``p_i * |W_dec[i]|``.
    The scale of activations in training is ``sqrt(d) / dataset_average_activation_norm.<hook point>``, a scalar beside
    the weights, or is read from the index.

    Source: fnlp/Llama-Scope-R1-Distill, OpenMOSS/Language-Model-SAEs of April 2025.
    """

    name: ClassVar[str] = "llama_scope_r1"
    files = (WEIGHTS,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files."""
        return folders_with(location, CONFIG, WEIGHTS)

    def claims(self, location: Location) -> bool:
        """Whether both files exist, and the weights are linear layers."""
        return is_trained_folder(location) and "encoder.weight" in location.content(WEIGHTS)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read conventions and site from ``config.json``, shapes and scales from the weights.

        Raises:
            CheckpointError: if the configuration has an unknown value.
        """
        config, where = location.read_json(CONFIG), f"{CONFIG} of {location}"
        if text(config, "sae_type", where, "sae") != "sae":
            raise CheckpointError(f"{where} has sae_type = {config['sae_type']!r}; expected 'sae'.")
        held = location.tensors(WEIGHTS)
        names = dict(NAMES)
        if flag(config, "use_decoder_bias", where, True):
            names["b_dec"] = "decoder.bias"
        if flag(config, "use_glu_encoder", where, False):
            names |= {"W_glu_T": "encoder_glu.weight", "b_glu": "encoder_glu.bias"}
        if threshold := [name for name in THRESHOLDS if name in held]:
            names["threshold"] = threshold[0]
        averages = [name for name in held if name.startswith(AVERAGE)]
        stored = renamed(held, names, f"{WEIGHTS} of {location}", besides=averages)
        is_r1 = _R1.search(location.repo_id) is not None
        known = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if is_r1 else None
        return checkpoint_as_trained(
            location,
            self.name,
            (CONFIG, WEIGHTS),
            config,
            held,
            stored,
            base_model=base_model_of(location, known),
            trained_on_bos=False if is_r1 else None,
        )

    def examples(self, root: Path) -> list[Example]:
        """Write SAEs of two data mixtures, with and without decoder norms in the gate."""
        repo = "fnlp/Llama-Scope-R1-Distill"
        mixtures = ("800M-Slimpajama-0-OpenR1-Math-220k", "400M-Slimpajama-400M-OpenR1-Math-220k")
        made = [Example(repo, f"{mixture}/L{layer}R") for mixture, layer in zip(mixtures, (1, 0), strict=True)]
        for seed, example in enumerate(made):
            generator, d, s = np.random.default_rng(seed), 16, 32
            folder = root / repo / example.address
            folder.mkdir(parents=True, exist_ok=True)
            hook = f"blocks.{example.address[-2]}.hook_resid_post"
            values: Any = {
                "encoder.weight": generator.normal(size=(s, d)),
                "encoder.bias": generator.normal(size=s),
                "decoder.weight": generator.normal(size=(d, s)) * generator.uniform(0.1, 0.6, s),
                "decoder.bias": generator.normal(size=d),
                "log_jumprelu_threshold": generator.normal(size=s),
                f"{AVERAGE}{hook}": 13.7,
            }
            tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
            save_file(tensors, folder / WEIGHTS, {"version": "0.1.0"})
            config = {
                **{"sae_type": "sae", "d_model": d, "expansion_factor": s // d, "use_decoder_bias": True},
                **{"act_fn": "jumprelu", "jump_relu_threshold": 0.0, "apply_decoder_bias_to_pre_encoder": False},
                **{"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": seed == 0, "top_k": 50},
                **{"hook_point_in": hook, "hook_point_out": hook, "use_glu_encoder": False},
            }
            (folder / CONFIG).write_text(json.dumps(config, indent=4))
        return made


def is_trained_folder(location: Location) -> bool:
    """Whether the folder has both files, and no ``cfg.json``, the name of another library's configuration."""
    return location.file is None and CONFIG in location and WEIGHTS in location and "cfg.json" not in location
