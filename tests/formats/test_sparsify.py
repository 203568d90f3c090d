"""Cases beyond the examples: invalid values, and folders that are not modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError

TENSORS = {
    "encoder.weight": torch.randn(12, 5),
    "encoder.bias": torch.randn(12),
    "W_dec": torch.randn(12, 5),
    "b_dec": torch.randn(5),
}


def written(
    root: Path, folder: str = "layers.3", *, run: Any = None, drop: tuple[str, ...] = (), **config: Any
) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in TENSORS.items() if name not in drop}
    save_file(tensors, root / folder / "sae.safetensors")
    (root / folder / "cfg.json").write_text(json.dumps({"d_in": 5, "k": 3, **config}))
    if run is not None:
        (root / "config.json").write_text(json.dumps(run))
    return root / folder


def config_of(root: Path, folder: str) -> Any:
    return SAEModel.from_pretrained(root, folder).config


@pytest.mark.parametrize(
    "config, message",
    [
        ({"d_in": 6}, "d_in = 6, but the tensors have 5"),
        ({"num_latents": 13}, "num_latents = 13, but the tensors have 12"),
        ({"num_latents": "12"}, "num_latents = '12'; expected a whole number"),
        ({"k": 0}, "k is 0"),
        ({"k": 13}, "k is 13"),
        ({"k": 2.5}, "k = 2.5; expected a whole number"),
        ({"k": True}, "k = True; expected a whole number"),
        ({"activation": "batchtopk"}, "expected one of topk, groupmax"),
        ({"activation": ["topk"]}, "expected one of topk, groupmax"),
        ({"activation": "groupmax", "k": 5}, "groups is 5, expected a divisor"),
        ({"transcode": "yes"}, "transcode = 'yes'; expected true or false"),
        ({"signed": 1}, "signed = 1; expected true or false"),
        ({"skip_connection": True}, "lacks W_skip"),
        ({"drop": ("W_dec",)}, "lacks W_dec"),
    ],
)
def test_invalid_checkpoints_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, InputError), match=message):
        SAEModel.from_pretrained(written(tmp_path, **config))


def test_an_invalid_run_configuration_is_refused(tmp_path: Path) -> None:
    written(tmp_path, run={"sae": {}, "model": 7})
    with pytest.raises(CheckpointError, match="model = 7; expected a text"):
        config_of(tmp_path, "layers.3")


def test_an_old_configuration_states_only_k(tmp_path: Path) -> None:
    folder = written(tmp_path, num_latents=0, k=2)
    (folder / "cfg.json").write_text(json.dumps({"k": 2}))
    sae = SAEModel.from_pretrained(folder)
    assert sae.config.architecture == "topk" and sae.config.k == 2 and sae.config.apply_b_dec_to_input


@pytest.mark.parametrize(
    "folder, site",
    [
        ("layers.3", "resid_post.3"),
        ("h.3/seed2", "resid_post.3"),
        ("decoder.layers.3", "resid_post.3"),
        ("language_model.layers.3", "resid_post.3"),
        ("layers.3.self_attn.o_proj", "layers.3.self_attn.o_proj.output"),
        ("h.3.mlp", "h.3.mlp.output"),
        ("embed_in", "embed_in.output"),
        ("vision_tower.layers.3", None),
        ("my-run", None),
        ("layers.x", None),
    ],
)
def test_folders_as_sites(folder: str, site: str | None, tmp_path: Path) -> None:
    written(tmp_path, folder)
    assert config_of(tmp_path, folder).site == site


def test_a_listed_hookpoint_is_a_module_whatever_its_name(tmp_path: Path) -> None:
    written(tmp_path, "rotary", run={"sae": {}, "model": "acme/lm", "hookpoints": ["rotary"]})
    config = config_of(tmp_path, "rotary")
    assert config.site == "rotary.output" and config.base_model == "acme/lm" and config.base_model_revision is None


def test_a_configuration_of_something_else_is_not_the_runs(tmp_path: Path) -> None:
    written(tmp_path, run={"model_type": "llama", "model": "acme/lm"})
    assert config_of(tmp_path, "layers.3").base_model is None


def test_the_root_itself(tmp_path: Path) -> None:
    written(tmp_path, "")
    assert SAEModel.from_pretrained(tmp_path).config.site is None


@pytest.mark.parametrize("folder", ["layers.3", "layers.3/seed1"])
def test_a_folder_that_is_opened_directly(folder: str, tmp_path: Path) -> None:
    assert SAEModel.from_pretrained(written(tmp_path, folder)).config.site == "resid_post.3"
