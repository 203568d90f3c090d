"""The input of a sublayer is what its first linear maps read, if no other part of the stream reaches it."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING

from hf_gated_sae.sites import resolve
from hub_scripts.tiny_types import build
from tests.sites.home_made import WIDTH, Attention, Block, Mlp, Model, places, run
from tests.support.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("name", "layer", "found"),
    [
        ("inkling_text", 1, {"attn_in": "model.layers.L.self_attn.input", "mlp_in": "model.layers.L.mlp.input"}),
        ("inkling2_text", 1, {"attn_in": "model.layers.L.self_attn.input", "mlp_in": "model.layers.L.mlp.input"}),
        ("zamba", 2, {"attn_in": "model.layers.L.mamba_decoder.mamba.input"}),
        ("zamba2", 2, {"attn_in": "model.layers.L.mamba_decoder.mamba.input"}),
        ("ctrl", 1, {"attn_in": "transformer.h.L.layernorm1.output"}),  # query, key and value are separate arguments
    ],
)
def test_inputs_are_those_of_a_hand_made_table(name, layer, found):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no model type {name!r}")
    assert places(resolve(build(name)), layer).items() >= found.items()


def test_a_norm_within_the_sublayer_comes_before_what_it_reads():
    model = tiny_model("roberta-prelayernorm")
    sites = resolve(model)
    layer = model.roberta_prelayernorm.encoder.layer[1]
    seen = run(model, sites, dict.fromkeys(("resid_pre.1", "attn_in.1", "resid_mid.1", "mlp_in.1"), lambda x: None))
    with torch.no_grad():
        assert torch.equal(seen["attn_in.1"], layer.attention.LayerNorm(seen["resid_pre.1"]))
        assert torch.equal(seen["mlp_in.1"], layer.intermediate.LayerNorm(seen["resid_mid.1"]))


def test_the_input_of_a_sublayer_comes_before_its_mixing_of_positions():
    found = places(resolve(tiny_model("rwkv")))
    assert (found["attn_in"], found["mlp_in"]) == ("rwkv.blocks.L.attention.input", "rwkv.blocks.L.feed_forward.input")


class NormsItself(Attention):
    """Norms its input without a module; all three maps read the result."""

    def forward(self, x):
        return super().forward(functional.layer_norm(x, (WIDTH,)))


class NormsAsModule(Mlp):
    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48)

    def forward(self, x):
        x = self.norm(x)
        return self.down(functional.gelu(self.up(x)) * self.gate(x))


class Plain(Block):
    """Passes the stream to its sublayers unchanged."""

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


def test_a_common_input_that_no_module_returns_is_written_in_place():
    model = Model(lambda: Plain(NormsItself, NormsAsModule))
    sites = resolve(model)
    found = places(sites)
    assert (found["attn_in"], found["mlp_in"]) == ("layers.L.attn.q.input", "layers.L.mlp.norm.output")
    block = model.layers[1]
    clean = run(model, sites, dict.fromkeys(("resid_pre.1", "attn_in.1", "attn_out.1"), lambda x: None))
    with torch.no_grad():
        assert torch.equal(clean["attn_in.1"], functional.layer_norm(clean["resid_pre.1"], (WIDTH,)))
        other = torch.randn_like(clean["attn_in.1"])
        after = run(model, sites, {"attn_in.1": lambda x: other, "attn_out.1": lambda x: None})
        torch.testing.assert_close(after["attn_out.1"], Attention.forward(block.attn, other))


class Short(nn.Module):
    """A convolution over a few positions, in each channel separately."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x):
        return self.conv(x.mT)[..., : x.shape[1]].mT


class ConvolvedBlock(Block):
    """Calls a sublayer, and a convolution on its output."""

    def __init__(self):
        super().__init__()
        self.short = Short()

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.short(self.mlp(self.n2(x)))


def test_a_short_convolution_after_a_sublayer_is_not_mistaken_for_it():
    assert places(resolve(Model(ConvolvedBlock)))["mlp_in"] == "layers.L.mlp.input"


class Two(nn.Module):
    """A feed-forward that reads two tensors."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x, y):
        return self.down(functional.gelu(self.up(x)) * self.gate(y))


class ReadsTwo(Block):
    def __init__(self):
        super().__init__(mlp=Two)
        self.n3 = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.n3.bias)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x), self.n3(x))


def test_a_sublayer_that_reads_several_tensors_has_no_single_input():
    found = places(resolve(Model(ReadsTwo)))
    assert found["mlp_in"] == "the sublayer reads more of the block than the input of layers.L.mlp"
    assert (found["mlp_neurons"], found["mlp_out"]) == ("layers.L.mlp.down.input", "layers.L.mlp.output")
