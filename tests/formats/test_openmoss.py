"""What the OpenMOSS layouts, Goodfire's and Qwen's refuse, and what they take from the index."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError
from hf_gated_sae.formats import Example, _openmoss, formats

SCOPE = Example("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x")
R1 = Example("fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L1R")
SCOPIUM = "acme/llama-3.1-8b-llamascopium"


def written(tmp_path: Path, name: str, example: Example, config: dict[str, Any] | None = None) -> Path:
    """Write the examples, change the configuration of one (None removes a key), and return its repository."""
    formats[name].examples(tmp_path)
    folder = tmp_path / example.repo / example.address
    if config is not None:
        [file] = folder.glob("*.json")
        changed = {**json.loads(file.read_text()), **config}
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return tmp_path / example.repo


@pytest.mark.parametrize(
    "config, message",
    [
        ({"d_model": None}, "has no d_model"),
        ({"d_model": "16"}, "d_model = '?16'?; expected a whole number"),
        ({"d_model": 17}, "d_model = 17 and d_sae = 32, but the encoder has d_in = 16"),
        ({"hook_point_in": None}, "has no hook_point_in"),
        ({"hook_point_in": 3}, "hook_point_in = '?3'?; expected a text"),
        ({"hook_point_in": "blocks.1.hook_resid_psot"}, "unknown.*hook_resid_post"),
        ({"hook_point_out": "blocks.1.ln2.hook_normalized"}, "expected a site that a block writes"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'; expected one of relu, topk, jumprelu"),
        ({"jump_relu_threshold": -0.1}, "jump_relu_threshold = -0.1; expected none below zero"),
        ({"jump_relu_threshold": math.nan}, "expected a finite number"),
        ({"norm_activation": "token-wise"}, "expected 'dataset-wise'"),
        ({"dataset_average_activation_norm": None}, "has no dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": 4.0}, "expected a mapping"),
        ({"dataset_average_activation_norm": {"in": 2.0}}, "has no out"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 2.0}}, "average norm 0; expected a positive one"),
        ({"dataset_average_activation_norm": {"in": 10**400, "out": 2.0}}, "expected a finite number"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"use_decoder_bias": False}, "has an unknown decoder.bias"),
        ({"sparsity_include_decoder_norm": "yes"}, "expected true or false"),
        ({"act_fn": "topk", "jump_relu_threshold": 0.0, "top_k": 10**30}, "k is .*expected 1"),
    ],
)
def test_llama_scope_refuses_what_it_does_not_know(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    repo = written(tmp_path, "llama_scope", SCOPE, config)
    with pytest.raises((CheckpointError, InputError), match=message):
        SAEModel.from_pretrained(repo, SCOPE.address)


@pytest.mark.parametrize(
    "config, architecture",
    [
        ({"act_fn": "topk"}, "jumprelu"),
        ({"act_fn": "topk", "jump_relu_threshold": 0.0, "top_k": 4}, "topk"),
        ({"act_fn": "relu"}, "standard"),
    ],
)
def test_llama_scope_is_loaded_as_its_authors_do(config: dict[str, Any], architecture: str, tmp_path: Path) -> None:
    """A TopK with a threshold becomes a JumpReLU; without one the norms are in the latents that are ranked."""
    repo = written(tmp_path, "llama_scope", SCOPE, config)
    sae = SAEModel.from_pretrained(repo, SCOPE.address).float()
    assert sae.config.architecture == architecture
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_without_decoder_norms_latents_are_in_units_of_the_raw_input(tmp_path: Path) -> None:
    """The authors divide the encoder's bias by the input's scale, and leave its matrix alone."""
    repo = written(tmp_path, "llama_scope", SCOPE, {"sparsity_include_decoder_norm": False})
    sae = SAEModel.from_pretrained(repo, SCOPE.address).double()
    raw = load_file(repo / SCOPE.address / "checkpoints/final.safetensors")
    scale = 4 / 2  # sqrt(16) / average
    torch.testing.assert_close(sae.W_enc_T, raw["encoder.weight"].double())
    torch.testing.assert_close(sae.b_enc, raw["encoder.bias"].double() / scale)
    torch.testing.assert_close(sae.W_dec, raw["decoder.weight"].double().T)
    torch.testing.assert_close(sae.b_dec, raw["decoder.bias"].double() / scale)
    assert (sae.threshold == 0.75).all()


@pytest.mark.parametrize(
    "kind, words",
    [
        ("clt", "a cross-layer transcoder"),
        ("crosscoder", "a crosscoder"),
        ("lorsa", "a low-rank sparse attention"),
        ("molt", "a mixture of linear transforms"),
        ("new", "the unknown sae_type 'new'"),
    ],
)
def test_llamascopium_names_what_it_cannot_load(kind: str, words: str, tmp_path: Path) -> None:
    repo = written(tmp_path, "llamascopium", Example(SCOPIUM, "relu"), {"sae_type": kind})
    with pytest.raises(CheckpointError, match=f"is .*{words}.*expected an SAE or a transcoder"):
        SAEModel.from_pretrained(repo, "relu")


@pytest.mark.parametrize(
    "folder, config, message",
    [
        ("relu", {"norm_activation": "batch-wise"}, "cannot be encoded"),
        ("transcoder", {"norm_activation": "token-wise"}, "for a transcoder"),
        ("relu", {"act_fn": "layertopk"}, "act_fn = 'layertopk'"),
        ("relu", {"act_fn": "jumprelu"}, "no log_jumprelu_threshold"),
        ("glu-relu", {"act_fn": "topk"}, "use_glu_encoder together with act_fn = 'topk'"),
        ("relu", {"d_model": 8}, "d_model = 8, but the encoder reads 9"),
        ("relu", {"hook_point_in": "blocks.1.ln2.hook_normalized"}, "unknown whether the base model"),
        ("relu", {"use_decoder_bias": True}, "lacks b_D"),
        ("topk", {"top_k": 0}, "k is 0"),
        ("jumprelu", {"hook_point_out": "blocks.0.hook_mlp_out"}, "neither in the weights"),
    ],
)
def test_llamascopium_refuses_what_it_does_not_know(
    folder: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    repo = written(tmp_path, "llamascopium", Example(SCOPIUM, folder), config)
    with pytest.raises((CheckpointError, InputError), match=message):
        SAEModel.from_pretrained(repo, folder)


def test_the_input_scale_is_in_the_file_or_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = written(tmp_path, "llama_scope_r1", R1)
    wanted = SAEModel.from_pretrained(repo, R1.address)
    file = repo / R1.address / "sae_weights.safetensors"
    tensors = load_file(file)
    average = tensors.pop("dataset_average_activation_norm.blocks.1.hook_resid_post")
    save_file(tensors, file)
    monkeypatch.setattr(_openmoss, "known_facts", lambda repo_id, address: {})
    with pytest.raises(CheckpointError, match="neither in the weights.*nor known for fnlp/Llama-Scope-R1-Distill"):
        SAEModel.from_pretrained(repo, R1.address)
    known = {"input_scale": 4 / float(average), "base_model": "acme/lm"}
    monkeypatch.setattr(_openmoss, "known_facts", lambda repo_id, address: known)
    sae = SAEModel.from_pretrained(repo, R1.address)
    assert sae.config.base_model == "acme/lm"
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name])


@pytest.mark.parametrize("average", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_average_is_refused(average: float, tmp_path: Path) -> None:
    repo = written(tmp_path, "llama_scope_r1", R1)
    file = repo / R1.address / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["dataset_average_activation_norm.blocks.1.hook_resid_post"] = torch.tensor(average)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="expected a positive one"):
        SAEModel.from_pretrained(repo, R1.address)


def test_a_file_can_be_named_where_the_folder_would_do(tmp_path: Path) -> None:
    formats["goodfire"].examples(tmp_path)
    repo = tmp_path / "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
    by_file = SAEModel.from_pretrained(repo, "Llama-3.1-8B-Instruct-SAE-l19.pth")
    assert by_file.config.site == "resid_post.19"
    shutil.copy(repo / "Llama-3.1-8B-Instruct-SAE-l19.pth", repo / "Llama-3.1-8B-Instruct-SAE-l20.pth")
    with pytest.raises(MissingFileError, match="SAE-l20.pth"):
        SAEModel.from_pretrained(repo)
    assert SAEModel.from_pretrained(repo, "Llama-3.1-8B-Instruct-SAE-l20.pth").config.site == "resid_post.20"


def test_qwen_scope_needs_to_know_how_many_latents_are_kept(tmp_path: Path) -> None:
    formats["qwen_scope"].examples(tmp_path)
    named = tmp_path / "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_14"
    described = shutil.copytree(named, tmp_path / "mine")
    sae = SAEModel.from_pretrained(described, "layer3.sae.pt")
    assert (sae.config.k, sae.config.base_model, sae.signed) == (14, None, True)
    (described / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not stated; expected it at the end of the repository's name"):
        SAEModel.from_pretrained(described, "layer3.sae.pt")
    (named / "config.json").write_text('{"k": 5}')
    with pytest.raises(CheckpointError, match="is 14 or 5"):
        SAEModel.from_pretrained(named, "layer3.sae.pt")
