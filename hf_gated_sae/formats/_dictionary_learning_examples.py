"""Example checkpoints in the layout of dictionary_learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Example

_SAEBENCH = "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108"
_PYTHIA = "canrager/lm_sae"
_RUN = "pythia70m_sweep_standard_ctx128_0712"
_CHAT = "andyrdt/saes-llama-3.1-8b-instruct"
D_SAE = 16
K = 3
NORM_FACTOR = 2.5


def _plan() -> list[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """Return repository, file, class, ``trainer`` of the configuration, and scalars beside the weights."""
    pythia = {"lm_name": "EleutherAI/pythia-70m-deduped"}
    gemma = {"lm_name": "google/gemma-2-2b"}
    return [
        (_SAEBENCH, "gemma-2-2b_standard_new/resid_post_layer_12/trainer_0/ae.pt", "AutoEncoder",
         {**gemma, "layer": 12, "submodule_name": "resid_post_layer_12"}, {}),
        (_PYTHIA, f"{_RUN}/resid_pre_layer_4/trainer_1/ae.pt", "AutoEncoderNew", {**pythia, "layer": 4}, {}),
        (_PYTHIA, f"{_RUN}/mlp_out_layer_3/trainer_2/ae.pt", "GatedAutoEncoder",
         {**pythia, "layer": 3, "submodule_name": "mlp_out_layer_3"}, {}),
        (_PYTHIA, f"{_RUN}/attn_out_layer_3/trainer_0/ae.pt", "AutoEncoderTopK",
         {"lm_name": "pythia-70m-deduped", "layer": 3, "submodule_name": "attn_out_layer3"}, {"k": K}),
        (_PYTHIA, f"{_RUN}/resid_post_layer_4/trainer_7/ae.pt", "AutoEncoderTopK old",
         {**pythia, "layer": 4, "k": K}, {}),
        (_CHAT, "resid_post_layer_11/trainer_1/ae.pt", "BatchTopKSAE",
         {"lm_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 11, "submodule_name": "resid_post_layer_11", "k": K},
         {"k": K, "threshold": 1.25}),
        (_CHAT, "resid_post_layer_11_checkpoints/trainer_1_step_10/ae.pt", "BatchTopKSAE",
         {"lm_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 11, "submodule_name": "resid_post_layer_11", "k": K},
         {"k": K, "threshold": -1.0}),
        (_SAEBENCH, "gemma-2-2b_matryoshka_batch_top_k/resid_post_layer_12/trainer_0/ae.pt", "MatryoshkaBatchTopKSAE",
         {**gemma, "layer": 12, "submodule_name": "resid_post_layer_12", "k": K}, {"k": K, "threshold": 0.75}),
        (_SAEBENCH, "gemma-2-2b_jump_relu/resid_post_layer_5/trainer_3/ae.pt", "JumpReluAutoEncoder",
         {**gemma, "layer": 5, "submodule_name": "resid_post_layer_5"}, {}),
        (_PYTHIA, "interrupted/resid_post_layer_4/trainer_0/ae.pt", "GatedAutoEncoder backup",
         {**pythia, "layer": 4, "submodule_name": "resid_post_layer_4"}, {}),
        (_PYTHIA, "interrupted/resid_post_layer_5/trainer_0/ae.pt", "BatchTopKSAE backup",
         {**pythia, "layer": 5, "submodule_name": "resid_post_layer_5", "k": K}, {"k": K, "threshold": -1.0}),
        (_PYTHIA, "steps/resid_post_layer_4/trainer_0/checkpoints/ae_0.pt", "AutoEncoder",
         {**pythia, "layer": 4, "submodule_name": "resid_post_layer_4"}, {}),
        (_PYTHIA, "steps/resid_post_layer_4/trainer_0/checkpoints/ae_100.pt", "AutoEncoder",
         {**pythia, "layer": 4, "submodule_name": "resid_post_layer_4"}, {}),
        (_PYTHIA, "transcoder/mlp_layer_2/trainer_0/ae.pt", "AutoEncoder", {**pythia, "layer": 2, "io": "in_and_out",
         "submodule_name": "mlp_layer_2"}, {}),
        (_PYTHIA, "transcoder/gemma_mlp/trainer_0/ae.pt", "AutoEncoder", {**gemma, "layer": 2, "io": "in_and_out",
         "submodule_name": "mlp_layer_2"}, {}),
        (_PYTHIA, "inputs/trainer_0/ae.pt", "AutoEncoder", {**pythia, "layer": 2, "io": "in",
         "submodule_name": "resid_post_layer_2"}, {}),
    ]  # fmt: skip


def write_examples(root: Path) -> list[Example]:
    """Write one SAE of every class, and of every possible path of the weights, below ``root/<repo>``."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (repo, path, kind, trainer, scalars) in enumerate(_plan()):
        file = root / repo / path
        dict_class, _, special = kind.partition(" ")
        content: dict[str, Any] = _state(dict_class, 5 + number % 4, generator, **scalars)
        if special == "old":
            del content["threshold"]
        if special == "backup":
            content = {
                "step": 100,
                "ae": content,
                "optimizer": {
                    "state": {0: {"step": torch.tensor(100.0), "exp_avg": torch.zeros(3)}},
                    "param_groups": [],
                },
                "config": {"lr": 1e-3},
                "norm_factor": NORM_FACTOR,
            }
        home = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)
        (home / "config.json").write_text(json.dumps(_config(dict_class, trainer)))
        made.append(Example(repo, path.removesuffix("/ae.pt")))
    return made


def _config(dict_class: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    trainer = dict(trainer)
    buffer = {"d_submodule": 6, "io": trainer.pop("io", "out"), "n_ctxs": 8, "ctx_len": 128, "device": "cuda:0"}
    common = {"trainer_class": "ATrainer", "dict_class": dict_class, "activation_dim": 6, "dict_size": D_SAE}
    return {"trainer": {**common, **trainer, "wandb_name": "a", "steps": 1000}, "buffer": buffer}


def _state(dict_class: str, d: int, generator: torch.Generator, **scalars: Any) -> dict[str, Tensor]:
    """Return the tensors that a class saves."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if dict_class in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        # The library creates the encoder as a transposed view, which is saved with those strides.
        state = {"W_enc": random(D_SAE, d).T, "b_enc": random(D_SAE), "W_dec": random(D_SAE, d), "b_dec": random(d)}
    elif dict_class == "GatedAutoEncoder":
        vectors = {name: 0.3 * random(D_SAE) for name in ("r_mag", "gate_bias", "mag_bias")}
        weights = {"encoder.weight": random(D_SAE, d), "decoder.weight": random(d, D_SAE)}
        state = {"decoder_bias": random(d), **weights, **vectors}
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(dict_class, "b_dec")
        weights = {"encoder.weight": random(D_SAE, d), "encoder.bias": random(D_SAE)}
        state = {bias: random(d), **weights, "decoder.weight": random(d, D_SAE)}
    if dict_class == "JumpReluAutoEncoder":
        state["threshold"] = torch.rand(D_SAE, generator=generator) + 0.1
    elif dict_class.endswith(("TopK", "TopKSAE")):
        state["threshold"] = torch.tensor(float(scalars.get("threshold", 0.5)))
        if "k" in scalars:
            state["k"] = torch.tensor(scalars["k"], dtype=torch.int)
    if dict_class == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([4, 4, 8])
    return state
