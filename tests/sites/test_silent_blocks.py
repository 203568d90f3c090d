"""Blocks that add nothing, or lack one contribution, cost the rest of the model no sites."""

import pytest
import torch
from torch import nn

from hf_gated_sae.sites import Site, resolve
from tests.sites.home_made import run
from tests.support.tiny_models import LAYERS, tiny_model

pytestmark = pytest.mark.slow

# The blocks, and the last linear maps of attention and feed-forward.
FAMILIES = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gemma2": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
}
STREAM = ("resid_pre", "resid_post")
HALVES = {"attn": ("attn_in", "attn_z"), "mlp": ("mlp_in", "mlp_neurons")}


def silence(model, name, layers, halves=("attn", "mlp")):
    """Set the last linear maps of some blocks to zero."""
    path, *maps = FAMILIES[name]
    for layer in layers:
        for half, module in zip(("attn", "mlp"), maps):
            if half in halves:
                for parameter in model.get_submodule(f"{path}.{layer}.{module}").parameters():
                    nn.init.zeros_(parameter)
    return model


def lost(model, name):
    """Return the sites that an unchanged model of the family has and this one lacks, with the reasons."""
    sites = resolve(model)
    missing = set(resolve(tiny_model(name)).names()) - set(sites.names())
    return {site: sites.refused[Site.parse(site)] for site in missing}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("half", HALVES)
def test_a_sublayer_that_returns_zeros_loses_only_its_own_sites(name, half):
    missing = lost(silence(tiny_model(name), name, [1], [half]), name)
    expected = {f"{kind}.1" for kind in HALVES[half]}
    expected |= {"resid_mid.1"} if half == "attn" and name not in ("gpt_neox", "bert") else set()
    assert set(missing) == expected
    for reason in missing.values():
        assert "all zero in the probe" in reason


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_block_that_adds_nothing_keeps_its_stream_and_other_blocks_all_sites(name, layer):
    model = silence(tiny_model(name), name, [layer])
    missing = lost(model, name)
    assert {site.partition(".")[2] for site in missing} == {str(layer)}
    assert not {f"{kind}.{layer}" for kind in (*STREAM, "attn_out", "mlp_out")} & set(missing)
    assert all("all zero in the probe" in reason for reason in missing.values())
    sites = resolve(model)
    written = run(model, sites, {f"resid_post.{layer}": lambda x: x + 1, f"attn_out.{layer}": lambda x: x - 2})
    clean = run(model, sites, {f"resid_pre.{layer}": lambda x: None})
    if name != "bert":
        assert torch.equal(written[f"resid_post.{layer}"], clean[f"resid_pre.{layer}"] - 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_if_no_block_adds_anything_the_stream_is_still_proven(name):
    model = silence(tiny_model(name), name, range(LAYERS))
    sites = resolve(model)
    for layer in range(LAYERS):
        assert {f"{kind}.{layer}" for kind in STREAM} <= set(sites.names())
    if name not in ("gpt_neox", "bert"):
        reason = sites.refused[Site("mlp_out", 1)]
        assert reason.startswith(f"{FAMILIES[name][0]}.1 returned its input unchanged in the probe: all outputs of ")
        assert reason.endswith("were zero")


def test_sites_lost_to_zeros_are_found_once_those_end():
    plain = resolve(tiny_model("llama")).names()
    for halves in (("attn",), ("attn", "mlp")):
        model = silence(tiny_model("llama"), "llama", [1], halves)
        assert resolve(model).names() != plain
        assert resolve(model) is resolve(model)
        model.load_state_dict(tiny_model("llama").state_dict())
        assert resolve(model).names() == plain


class Skipped(nn.Module):
    """Replaces a block that was removed."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_block_that_is_skipped_keeps_its_stream(name, layer):
    model = tiny_model(name)
    path = FAMILIES[name][0]
    model.get_submodule(path)[layer] = Skipped()
    missing = lost(model, name)
    assert {site.partition(".")[2] for site in missing} == {str(layer)}
    assert not {f"{kind}.{layer}" for kind in STREAM} & set(missing)
    assert set(missing.values()) == {f"{path}.{layer} returned its input unchanged in the probe"}


class Constant(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.ones_like(hidden_states).cumsum(-1), None


def test_a_constant_contribution_costs_the_other_one_no_sites():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = Constant()
    missing = lost(model, "llama")
    assert {"mlp_in.1", "mlp_out.1", "mlp_neurons.1"}.isdisjoint(missing)
    assert missing["attn_in.1"] == "a value written there had no effect"
