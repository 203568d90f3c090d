"""Layouts of one ``.pt`` file per SAE: OpenAI's, and the attention SAEs of GPT-2 small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, SAEError
from hf_gated_sae.formats import formats, sae_addresses
from hf_gated_sae.hub import locate


@pytest.fixture
def openai(tmp_path: Path) -> Path:
    formats["openai"].examples(tmp_path)
    return tmp_path / "acme" / "openai-gpt2-small"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "Identity"}, "expected one of ReLU, TopK"),
        ({"activation": ["TopK"]}, "expected one of ReLU, TopK"),
        ({"activation_state_dict": None}, "has no activation_state_dict"),
        ({"activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "postact_fn = 'Identity'"),
        ({"activation_state_dict": {"k": "5", "postact_fn": "ReLU"}}, "expected a whole number"),
        ({"activation_state_dict": {"k": 99, "postact_fn": "ReLU"}}, "k is 99"),
        ({"latent_bias": 3}, "holds latent_bias = '3'; expected a tensor"),
        ({"latent_bias": torch.zeros(7)}, "latent_bias|b_enc"),
        ({"decoder.weight": torch.zeros(16, 6)}, "rows, one per latent"),
        ({"W_other": torch.zeros(3)}, "unknown W_other"),
    ],
)
def test_invalid_openai_files_are_refused(openai: Path, changes: dict[str, Any], message: str) -> None:
    file = openai / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    torch.save({**torch.load(file, weights_only=True), **changes}, file)
    with pytest.raises(SAEError, match=message):
        SAEModel.from_pretrained(openai, "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt")


def test_an_openai_file_by_itself_has_no_site(openai: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (openai / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt").rename(alone / "mine.pt")
    config = SAEModel.from_pretrained(alone).config
    assert config.architecture == "topk" and config.site is None and config.base_model is None
    assert SAEModel.from_pretrained(alone, site="resid_post.8").config.site == "resid_post.8"


def test_openai_sites_are_found_from_inside_their_folders(openai: Path) -> None:
    assert sae_addresses(locate(str(openai)).at("gpt2-small/mlp_post_act")) == [
        "gpt2-small/mlp_post_act/autoencoders/11.pt"
    ]
    inner = SAEModel.from_pretrained(openai, "gpt2-small/mlp_post_act/autoencoders")  # the only file there
    assert inner.config.site == "mlp_neurons.11"


def test_a_tied_decoder_is_a_matrix_of_its_own(openai: Path) -> None:
    sae = SAEModel.from_pretrained(openai, "gpt2-small/mlp_post_act/autoencoders/11.pt")
    before = sae.W_dec.clone()
    with torch.no_grad():
        sae.W_enc_T.zero_()
    assert torch.equal(sae.W_dec, before) and before.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_name": None}, "has no act_name"),
        ({"act_name": "blocks.0.attn.hook_nothing"}, "which is unknown"),
        ({"act_size": 13}, "act_size = 13, and the tensors beside it have 12"),
        ({"dict_size": "16"}, "expected a whole number"),
    ],
)
def test_invalid_attention_saes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    example = formats["connor_rob"].examples(tmp_path)[0]
    described = tmp_path / example.repo / example.address.replace(".pt", "_cfg.json")
    described.write_text(json.dumps({**json.loads(described.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        SAEModel.from_pretrained(tmp_path / example.repo, example.address)
