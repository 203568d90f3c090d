"""Paths inside the base model, as EleutherAI's sparsify writes them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from hf_gated_sae import attach, capture
from hf_gated_sae.errors import SiteError
from hf_gated_sae.interventions import ProjectOut
from hf_gated_sae.sites import resolve
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    "family, inside, whole",
    [
        ("llama", "layers.1.mlp.output", "model.layers.1.mlp.output"),
        ("gpt_neox", "layers.1.attention.output", "gpt_neox.layers.1.attention.output"),
        ("gpt2", "h.2.mlp.input", "transformer.h.2.mlp.input"),
        ("gpt2", "wte.output", "transformer.wte.output"),
        ("opt", "decoder.layers.1.fc2.output", "model.decoder.layers.1.fc2.output"),
        ("gemma2", "layers.0.mlp.output", "model.layers.0.mlp.output"),
    ],
)
def test_a_path_inside_the_base_model_is_the_same_tensor_path(family: str, inside: str, whole: str) -> None:
    model = tiny_model(family)
    sites = resolve(model)
    assert sites[inside].tensor_path == sites[whole].tensor_path
    assert inside in sites
    found = capture(model, [inside, whole], input_ids=IDS)
    assert torch.equal(found[inside], found[whole])


def test_the_base_model_alone_has_these_paths() -> None:
    model = tiny_model("llama")
    base = AutoModel.from_config(model.config).eval()
    assert str(resolve(base)["layers.1.mlp.output"].tensor_path) == "layers.1.mlp.output"


def test_an_edit_at_such_a_path_acts() -> None:
    model = tiny_model("llama")
    before = model(input_ids=IDS).logits
    with attach(model, ProjectOut("layers.1.mlp.output", torch.ones(32))):
        assert not torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_path_that_neither_model_has_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(SiteError, match="no module 'layers.1.mpl'.*model.layers.1.mlp"):
        resolve(model)["layers.1.mpl.output"]
