"""Proven sites are checked against the operations of a forward, which the resolver does not use."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from hf_gated_sae.sites import Site, resolve
from hub_scripts.operations import Block, Recording, is_same
from hub_scripts.site_survey import traced_faults
from hub_scripts.tiny_types import build
from tests.support.tiny_models import tiny_model

IDS = torch.arange(3 * 9).mul(7).remainder(77).add(15).view(3, 9)

# Changes to the configuration, and the number of compared sites: up to seven kinds per block, over all layers.
SMALL = {
    "llama": ({}, 21),
    "gpt2": ({}, 21),
    "gemma2": ({}, 21),
    "gemma3_text": ({}, 21),
    "gemma4_text": ({"hidden_size_per_layer_input": 0}, 21),
    "gpt_neox": ({}, 18),
    "falcon_h1": ({}, 12),
    "mamba": ({}, 9),
    "olmo2": ({}, 21),
    "phi": ({}, 18),
    "bert": ({}, 21),
    "roberta-prelayernorm": ({}, 21),
    "minimax": ({}, 18),
    "doge": ({}, 21),
    "rwkv": ({"num_hidden_layers": 8}, 48),
}
BUILT = {"gemma4_unified_text": 28, "inkling_text": 20, "inkling2_text": 9, "zamba": 12, "zamba2": 12}


@pytest.mark.parametrize("name", SMALL)
def test_all_proven_sites_of_a_family_are_in_its_operations(name):
    changes, count = SMALL[name]
    model = tiny_model(name, **changes)
    assert traced_faults(model, resolve(model), IDS) == (count, [])


def test_the_common_input_of_experts_and_feed_forward_is_refused():
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=0, **experts)
    sites = resolve(model)
    assert traced_faults(model, sites, IDS) == (15, [])
    assert sites.refused[Site("mlp_in", 1)].startswith(
        "the input of model.layers.1.post_feedforward_layernorm is not the output of"
    )


@pytest.mark.parametrize("name", BUILT)
def test_all_proven_sites_of_a_built_type_are_in_its_operations(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no model type {name!r}")
    model = build(name)
    assert traced_faults(model, resolve(model)) == (BUILT[name], [])


def test_values_and_terms_of_a_recorded_block():
    generator = torch.Generator().manual_seed(0)
    x, weight, out, gain = (torch.randn(shape, generator=generator) for shape in ((6, 8), (8, 12), (12, 8), (8,)))
    with Recording() as recording:
        normed = x * gain
        read = (normed @ weight).tanh()
        added = read @ out
        end = (x + 0.3 * added) * 1.7
    block = Block(recording, x, end)
    assert {value.numel() for value in block.values} == {48}
    assert any(is_same(x + 0.3 * added, value) for value in block.values)
    assert not any(is_same(normed, value) for value in block.values)
    [term] = block.terms()
    assert is_same(term.content, 0.3 * added)
    assert is_same(block.first_operands(term)[0], normed)
    assert any(is_same(read, value) for value in block.last_operands(term))
