"""SAEs and transcoders trained with llamascopium (formerly Language-Model-SAEs), the OpenMOSS team's library."""

from __future__ import annotations

import json
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
from .llama_scope_r1 import CONFIG, WEIGHTS, is_trained_folder

NAMES = {"W_enc_T": "W_E.T", "b_enc": "b_E", "W_dec": "W_D"}
THRESHOLD = "activation_function.log_jumprelu_threshold"
KINDS = {
    "crosscoder": "a crosscoder, which reads and writes several layers at once",
    "clt": "a cross-layer transcoder, whose latents write into all later layers",
    "molt": "a mixture of linear transforms, which has no decoder directions",
    "lorsa": "a low-rank sparse attention, whose latents depend on other tokens",
}
"""Other kinds of model that the library trains, which are not read."""


class LlamascopiumFormat(CheckpointFormat):
    """Written by llamascopium: ``config.json`` with a ``sae_type``, and ``sae_weights.safetensors``.

    The weights are ``W_E [d, d_sae]`` and ``W_D [d_sae, d]``. With ``sparsity_include_decoder_norm`` the activation
    function (relu, jumprelu, topk or batchtopk) is applied to ``p_i * |W_D[i]|``, and active latents have the value
    ``p_i``. With ``use_glu_encoder`` ``p = (x @ W_E + b_E) * sigmoid(x @ W_E_glu + b_E_glu)``. ``norm_activation``
    determines the scaling of activations. A batch TopK, which selects the largest latents of all tokens of a batch,
    encodes each token as its own batch.

    Source: OpenMOSS/Language-Model-SAEs, ``llamascopium.models.sae``, 2026.
    """

    name: ClassVar[str] = "llamascopium"
    files = (WEIGHTS,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files."""
        return folders_with(location, CONFIG, WEIGHTS)

    def claims(self, location: Location) -> bool:
        """Whether both files exist and the configuration has a ``sae_type``, including kinds that cannot be read.

        The library's earlier versions had linear layers, and are another format.
        """
        if not is_trained_folder(location) or "encoder.weight" in location.content(WEIGHTS):
            return False
        return isinstance(location.read_json(CONFIG).get("sae_type"), str)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read conventions and site from ``config.json``, shapes and scales from the weights.

        Raises:
            CheckpointError: if it is neither an SAE nor a transcoder, or the configuration has an unknown value.
        """
        config, where = location.read_json(CONFIG), f"{CONFIG} of {location}"
        kind = text(config, "sae_type", where)
        if kind != "sae":
            what = KINDS.get(kind, f"of the unknown sae_type {kind[:40]!r}")
            raise CheckpointError(
                f"{location} is {what}; expected an SAE or a transcoder of one layer (sae_type 'sae')."
            )
        held = location.tensors(WEIGHTS)
        names = dict(NAMES)
        if flag(config, "use_decoder_bias", where, True):
            names["b_dec"] = "b_D"
        if flag(config, "use_glu_encoder", where, False):
            names |= {"W_glu_T": "W_E_glu.T", "b_glu": "b_E_glu"}
        if THRESHOLD in held:
            names["threshold"] = THRESHOLD
        averages = [name for name in held if name.startswith(AVERAGE)]
        stored = renamed(held, names, f"{WEIGHTS} of {location}", besides=averages)
        files = (CONFIG, WEIGHTS)
        return checkpoint_as_trained(
            location, self.name, files, config, held, stored, base_model=base_model_of(location)
        )

    def examples(self, root: Path) -> list[Example]:
        """Write one SAE of every activation function, a transcoder, GLUs, and each scaling of activations."""
        made = []
        for number, (folder, changes) in enumerate(_EXAMPLES.items()):
            made.append(Example("acme/llama-3.1-8b-llamascopium", folder))
            _write(root / made[-1].repo / folder, number, changes)
        return made


RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
_EXAMPLES: dict[str, dict[str, Any]] = {
    "relu": {"act_fn": "relu", "norm_activation": "inference", "use_decoder_bias": False},
    "jumprelu": {"act_fn": "jumprelu"},
    "topk": {"act_fn": "topk", "norm_activation": "token-wise"},
    "topk-unweighted": {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    "batchtopk": {"act_fn": "batchtopk"},
    "transcoder": {"act_fn": "jumprelu", "hook_point_in": MLP_IN, "hook_point_out": MLP_OUT},
    "glu": {"act_fn": "jumprelu", "use_glu_encoder": True},
    "glu-relu": {"act_fn": "relu", "use_glu_encoder": True, "norm_activation": "token-wise"},
}


def _write(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    """Write one example."""
    generator, d, s = np.random.default_rng(seed), 9, 18
    config = {
        **{"sae_type": "sae", "d_model": d, "expansion_factor": 2.0, "use_decoder_bias": True, "act_fn": "relu"},
        **{"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 5},
        **{"use_triton_kernel": False, "jumprelu_threshold_window": 2.0, "use_glu_encoder": False},
        **{"hook_point_in": RESID, "hook_point_out": RESID, **changes},
    }
    values: Any = {
        "W_E": generator.normal(size=(d, s)),
        "b_E": generator.normal(size=s),
        "W_D": generator.normal(size=(s, d)) * generator.uniform(0.1, 1.5, (s, 1)),
    }
    if config["use_decoder_bias"]:
        values["b_D"] = generator.normal(size=d)
    if config["act_fn"] == "jumprelu":
        values[THRESHOLD] = generator.normal(size=s) * 0.5
    if config["use_glu_encoder"]:
        values |= {"W_E_glu": generator.normal(size=(d, s)), "b_E_glu": generator.normal(size=s)}
    values |= {AVERAGE + config["hook_point_in"]: 7.1, AVERAGE + config["hook_point_out"]: 4.3}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    save_file(tensors, folder / WEIGHTS, {"version": "2.0.0"})
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
