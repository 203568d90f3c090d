"""Models that scale the whole stream: contributions are unscaled, and exact scaling does not break the chain."""

import pytest
import torch
from torch import nn

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import resolve
from tests.sites.home_made import IDS, WIDTH, Block, Model, run
from tests.support.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gemma4_adds_is_not_scaled_with_the_stream(dtype):
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=0).to(dtype)
    sites = resolve(model)
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    for layer, block in enumerate(model.model.layers):
        assert str(sites[f"mlp_out.{layer}"].tensor_path) == f"model.layers.{layer}.post_feedforward_layernorm.output"
        assert sites[f"mlp_out.{layer}"].tensor_path.scale == sites[f"attn_out.{layer}"].tensor_path.scale == 1.0
        pre, attn, mid, mlp, post = run(model, sites, {f"{k}.{layer}": lambda x: None for k in kinds}).values()
        assert torch.equal(mid, pre + attn)
        assert torch.equal(post, (mid + mlp) * block.layer_scalar)


class ScaledAfter(Block):
    """Scales the stream by a number after each addition."""

    first, second = 0.83, 1.21

    def forward(self, x):
        x = (x + self.attn(self.n1(x))) * self.first
        return (x + self.mlp(self.n2(x))) * self.second


class PowersOfTwo(ScaledAfter):
    first, second = 0.5, 0.25


class ChannelsAfter(Block):
    """Scales the channels of the stream after the second addition."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return (x + self.mlp(self.n2(x))) * self.gain


class ParallelAfter(Block):
    def forward(self, x):
        return (x + self.attn(self.n1(x)) + self.mlp(self.n2(x))) * 0.83


class ScaledBefore(Block):
    """Scales the stream alone, before the additions."""

    def forward(self, x):
        x = 2.0 * x + self.attn(self.n1(x))
        added = self.mlp(self.n2(x))  # first, so that a write at resid_mid comes before the stream is read below
        return 0.83 * x + added


class SmallFactorAfter(Block):
    """Scales a contribution by a known factor, and the sum by a power of two, which suggests another factor."""

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return (x + 0.22 * self.mlp(self.n2(x))) * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [ScaledAfter, PowersOfTwo, ChannelsAfter, ParallelAfter, ScaledBefore])
def test_contributions_are_not_scaled_with_the_stream(block, dtype):
    model = Model(block).to(dtype)
    sites = resolve(model)
    for layer in range(3):
        for name, path in (("attn_out", "attn"), ("mlp_out", "mlp")):
            place = sites[f"{name}.{layer}"].tensor_path
            assert (str(place), place.scale) == (f"layers.{layer}.{path}.output", 1.0)
        assert (f"resid_mid.{layer}" in sites) is (block is not ParallelAfter)


def test_a_known_factor_is_distinguished_from_the_scaling_of_the_sum():
    model = Model(SmallFactorAfter)
    model.config = type(
        "Config", (), {"to_dict": lambda self: {"share": 0.22}, "get_text_config": lambda self: None}
    )()
    assert resolve(model)["mlp_out.1"].tensor_path.scale == 0.22


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("layers", "every"), [(8, 6), (7, 2), (4, 1)])
def test_rwkv_that_halves_its_stream_has_the_sites_of_one_that_does_not(layers, every, training):
    model = tiny_model("rwkv", num_hidden_layers=layers, rescale_every=every).train(training)
    plain = resolve(tiny_model("rwkv", num_hidden_layers=layers, rescale_every=0))
    sites = resolve(model)
    assert sites.names() == plain.names()
    model.eval()
    seen = run(model, sites, {name: lambda x: None for name in sites.names()})
    for layer in range(layers):
        mid = seen[f"resid_mid.{layer}"]
        torch.testing.assert_close(seen[f"resid_post.{layer}"], mid + seen[f"mlp_out.{layer}"])
        if layer + 1 < layers:
            factor = 0.5 if (layer + 1) % every == 0 else 1.0
            assert torch.equal(seen[f"resid_pre.{layer + 1}"], seen[f"resid_post.{layer}"] * factor)
            assert (f"0.5 after rwkv.blocks.{layer}" in sites.evidence) is (factor == 0.5)


class Between(Model):
    """Scales the stream between its blocks."""

    factor = 0.25

    def forward(self, input_ids):
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x) * self.factor
        return (self.head(self.last(x)),)


def test_a_power_of_two_between_all_blocks_does_not_break_the_chain():
    model = Between()
    sites = resolve(model)
    seen = run(model, sites, {"resid_post.0": lambda x: x + 1, "resid_pre.1": lambda x: None})
    assert torch.equal(seen["resid_pre.1"], (seen["resid_post.0"] + 1) * 0.25)
    assert sites["mlp_out.1"].tensor_path.scale == 1.0


def test_another_factor_between_blocks_breaks_the_chain():
    model = Between()
    model.factor = 0.75
    with pytest.raises(SiteError, match="not bitwise the input of the next block, nor that times a power of two"):
        resolve(model)["resid_post.1"]
    model(IDS)
