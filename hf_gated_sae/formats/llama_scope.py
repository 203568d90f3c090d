"""Llama Scope (He et al. 2024, arXiv 2410.20526): SAEs and transcoders for Llama 3.1 8B."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from ..architectures.jumprelu import JumpReLUSAE
from ..architectures.standard import StandardSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling import SAEModel
from ..modeling.checkpoint import Checkpoint
from ._config_values import flag, integer, mapping, number, one_of
from ._openmoss import base_model_of, finish_standardised, site_fields, training_scale
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, widths

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
NAMES = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}
_LLAMA = re.compile(r"Llama3_1-8B-Base")


class LlamaScopeFormat(CheckpointFormat):
    """Written by the OpenMOSS team: ``hyperparams.json`` and ``checkpoints/final.safetensors``, two linear layers.

    In folders such as ``Llama3_1-8B-Base-L15R-8x/``. Loaded as the authors do: the scales of input and output,
    ``sqrt(d) / average norm``, are folded into the weights; then, with ``sparsity_include_decoder_norm``, decoder rows
    are scaled to unit norm; then ``latents = p * [p > jump_relu_threshold]``, with one threshold for all. Sites are
    TransformerLens's hook points; transcoders read ``ln2.hook_normalized`` and write ``hook_mlp_out``. Trained without
    BOS.

    Source: fnlp/Llama3_1-8B-Base-LX*, OpenMOSS/Language-Model-SAEs of November 2024.
    """

    name: ClassVar[str] = "llama_scope"
    files = ("final.safetensors",)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files."""
        folders = [file.removesuffix(CONFIG) for file in location.files if file.split("/")[-1] == CONFIG]
        return [folder.rstrip("/") for folder in folders if f"{folder}{WEIGHTS}" in location]

    def claims(self, location: Location) -> bool:
        """Whether both files exist, and the weights are linear layers."""
        if location.file is not None or CONFIG not in location or WEIGHTS not in location:
            return False
        return "encoder.weight" in location.content(WEIGHTS)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read conventions and site from ``hyperparams.json``, shapes from the header.

        Raises:
            CheckpointError: if the configuration has an unknown value, or contradicts the weights.
        """
        config, where = location.read_json(CONFIG), f"{CONFIG} of {location}"
        if flag(config, "use_glu_encoder", where, False):
            raise CheckpointError(f"{where} has use_glu_encoder, which Llama Scope's SAEs do not have.")
        biased = flag(config, "use_decoder_bias", where, True)
        names = {name: stored_name for name, stored_name in NAMES.items() if biased or name != "b_dec"}
        stored = renamed(location.tensors(WEIGHTS), names, f"{WEIGHTS} of {location}")
        d_sae, d_in, d_out = widths(stored)
        if (integer(config, "d_model", where), integer(config, "d_sae", where, d_sae)) != (d_in, d_sae):
            raise CheckpointError(
                f"{where} has d_model = {config['d_model']} and d_sae = {config.get('d_sae')}, but the encoder has "
                f"d_in = {d_in} and d_sae = {d_sae}: fetch it again."
            )
        known = "meta-llama/Llama-3.1-8B" if _LLAMA.search(f"{location.repo_id}/{location.address}") else None
        found = site_fields(config, base_model_of(location, known), where)
        model_class, more, threshold = _activation(config, where)
        model_config = model_class.config_class(
            **{"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "trained_on_bos": False},
            apply_b_dec_to_input=flag(config, "apply_decoder_bias_to_pre_encoder", where, True),
            **found,
            **more,
        )
        finish = partial(
            finish_standardised,
            scales=_scales(config, where),
            by_norm=flag(config, "sparsity_include_decoder_norm", where, True),
            threshold=threshold,
            width=d_out,
        )
        return Checkpoint(
            model_class, model_config, location.origin(self.name, [CONFIG, WEIGHTS]), stored, finish=finish
        )

    def examples(self, root: Path) -> list[Example]:
        """Write an SAE of every site, and a transcoder; real files are in bfloat16, with columns of any norm."""
        made = []
        for kind, layer, expansion, dtype in (
            ("R", 1, 8, torch.bfloat16),
            ("A", 0, 8, torch.float32),
            ("M", 1, 32, torch.float32),
            ("TC", 1, 8, torch.float32),
        ):
            repo = f"fnlp/Llama3_1-8B-Base-LX{kind}-{expansion}x"
            made.append(Example(repo, f"Llama3_1-8B-Base-L{layer}{kind}-{expansion}x"))
            _write(root / repo / made[-1].address, kind, layer, dtype)
        return made


def _activation(config: Mapping[str, Any], where: str) -> tuple[type[SAEModel], dict[str, Any], float | None]:
    """Return the architecture, its own configuration fields, and the threshold.

    A TopK with a threshold is used as a JumpReLU, as the authors do.

    Raises:
        CheckpointError: if the threshold is negative.
    """
    name = one_of(config, "act_fn", where, ("relu", "topk", "jumprelu"), "relu")
    threshold = number(config, "jump_relu_threshold", where, 0.0)
    if threshold < 0:
        raise CheckpointError(f"{where} has jump_relu_threshold = {threshold}; expected none below zero.")
    if name == "jumprelu" or (name == "topk" and threshold > 0):
        return JumpReLUSAE, {}, float(threshold)
    if name == "topk":
        return TopKSAE, {"k": integer(config, "top_k", where, 50)}, None
    return StandardSAE, {}, None


def _scales(config: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Return the factors of input and output in training.

    Raises:
        CheckpointError: if the average norms are missing, or tokens were scaled individually.
    """
    kinds = ("dataset-wise", "inference", "none", "token-wise", "batch-wise")
    kind = one_of(config, "norm_activation", where, kinds, "token-wise")
    if kind in ("inference", "none"):
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise CheckpointError(f"{where} has norm_activation = {kind!r}; expected 'dataset-wise', as in Llama Scope.")
    averages = mapping(config, "dataset_average_activation_norm", where)
    within, d_model = f"dataset_average_activation_norm in {where}", integer(config, "d_model", where)
    scale_in, scale_out = (training_scale(number(averages, end, within), d_model, within) for end in ("in", "out"))
    return scale_in, scale_out


HOOKS = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out", "TC": "ln2.hook_normalized"}
# Columns whose squares sum to a power of four, so that bfloat16 represents their unit-norm multiples exactly.
EXACT = np.array([[7, 3, 2, 1, 1], [5, 5, 3, 2, 1]]) / 8


def _write(folder: Path, kind: str, layer: int, dtype: torch.dtype) -> None:
    """Write one example."""
    generator = np.random.default_rng(layer + len(kind) + ord(kind[0]))
    d, s = 16, 32
    decoder = generator.normal(size=(d, s)) * generator.uniform(0.3, 2, s)
    if dtype == torch.bfloat16:
        decoder = np.zeros((d, s))
        for column in range(s):
            values = EXACT[column % 2] * generator.choice([-1, 1], 5) * 2.0 ** generator.integers(-2, 3)
            decoder[generator.permutation(d)[:5], column] = values
    values = {
        "encoder.weight": generator.normal(size=(s, d)),
        "encoder.bias": generator.normal(size=s),
        "decoder.weight": decoder,
        "decoder.bias": generator.normal(size=d),
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file({name: torch.tensor(value).to(dtype) for name, value in values.items()}, folder / WEIGHTS)
    written = f"blocks.{layer}.{HOOKS['M' if kind == 'TC' else kind]}"
    averages = {"in": 2.0, "out": 2.0} if dtype == torch.bfloat16 else {"in": 11.3, "out": 11.3}
    config = {
        **{"hook_point_in": f"blocks.{layer}.{HOOKS[kind]}", "hook_point_out": written},
        **{"use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False},
        **{"expansion_factor": s // d, "d_model": d, "d_sae": s, "act_fn": "jumprelu", "jump_relu_threshold": 0.75},
        **{"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 50},
        "dataset_average_activation_norm": {"in": 4.0, "out": 0.9} if kind == "TC" else averages,
        **{"decoder_exactly_fixed_norm": False, "use_glu_encoder": False, "lp": 1, "dtype": str(dtype)},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
