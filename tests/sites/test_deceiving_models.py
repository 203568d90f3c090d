"""Models whose modules suggest wrong tensor paths: sites that cannot be proven are refused."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import Site, resolve
from hf_gated_sae.sites.norm_sites import Norms
from hf_gated_sae.sites.probe import make_subject, trace
from hf_gated_sae.sites.site_map import SiteMap
from tests.sites.home_made import WIDTH, Attention, Block, Mlp, Model, places, run
from tests.support.tiny_models import tiny_model


class OwnMatrices(nn.Module):
    """An attention without submodules."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = (
            nn.Parameter(torch.randn(96, WIDTH) / 5),
            nn.Parameter(torch.randn(WIDTH, WIDTH) / 5),
        )

    def forward(self, x):
        q, k, v = (x @ self.inward.T).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True) @ self.outward.T


class Tied(nn.Module):
    """A feed-forward without submodules, with one matrix for both of its maps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, WIDTH) / 5)

    def forward(self, x):
        return torch.relu(x @ self.weight.T) @ self.weight


class Gated(Block):
    """Scales its contributions by learned factors."""

    def __init__(self, first=0.7311, second=0.4177):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(first)), nn.Parameter(torch.tensor(second))

    def forward(self, x):
        x = x + self.first * self.attn(self.n1(x))
        return x + self.second * self.mlp(self.n2(x))


class Hidden(Block):
    """Scales the attention by a factor that is no parameter, so small that rounding nearly hides what is added."""

    def forward(self, x):
        x = x + 0.013 * self.attn(self.n1(x))
        return x + 1.37 * self.mlp(self.n2(x))


class OneChannel(Block):
    def forward(self, x):
        x = Block.forward(self, x).clone()
        x[..., 5] += 0.05
        return x


class Twice(Block):
    def forward(self, x):
        x = x + self.attn(self.n1(x))
        added = self.mlp(self.n2(x))
        return x + added + added


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", ["bert", "roberta", "roberta-prelayernorm", "bloom", "llama", "gpt_neox"])
def test_a_write_within_a_branch_changes_that_contribution_and_nothing_else(name):
    model = tiny_model(name)
    sites = resolve(model)
    outs = ("attn_out.1", "mlp_out.1")
    clean = run(model, sites, dict.fromkeys((*outs, "resid_post.1"), lambda x: None))
    for site, out in zip(("attn_in.1", "attn_z.1", "mlp_in.1", "mlp_neurons.1"), (outs[0], outs[0], outs[1], outs[1])):
        held = {name: lambda x, name=name: clean[name] for name in outs}
        after = run(model, sites, {site: lambda x: x + x.roll(1, -1), **held, "resid_post.1": lambda x: None})
        assert not torch.allclose(after[out], clean[out]), site
        assert torch.equal(after["resid_post.1"], clean["resid_post.1"]), site


def test_inputs_of_branches_where_a_module_adds_to_what_it_reads():
    found = places(resolve(tiny_model("bert")))
    assert found["attn_in"] == "bert.encoder.layer.L.attention.self.input"
    assert found["mlp_in"] == "bert.encoder.layer.L.intermediate.input"


class Added(nn.Module):
    """A feed-forward that adds its contribution to the stream itself."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class AddsWithin(Block):
    def __init__(self):
        super().__init__(mlp=Added)

    def forward(self, x):
        return self.mlp(x + self.attn(self.n1(x)))


def test_the_input_of_a_module_that_also_adds_it_is_refused():
    found = places(resolve(Model(AddsWithin)))
    assert found["mlp_in"] == "layers.L.mlp also adds to the tensor that it reads"
    assert found["mlp_neurons"] == "layers.L.mlp.down.input"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_without_submodules_is_not_mistaken_for_a_linear_module(dtype):
    found = places(resolve(Model(lambda: Block(OwnMatrices, Tied)).to(dtype)))
    assert found["attn_z"] == "it is computed inside layers.L.attn, which is not linear"
    assert found["mlp_neurons"] == "it is computed inside layers.L.mlp, which is not linear"
    assert (found["attn_in"], found["mlp_in"]) == ("layers.L.attn.input", "layers.L.mlp.input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [(0.7311, 0.4177), (0.013, 1.37)])
def test_learned_factors_are_those_of_the_block(dtype, factors):
    model = Model(lambda: Gated(*factors)).to(dtype)
    sites = resolve(model)
    for layer, block in enumerate(model.layers):
        assert sites[f"attn_out.{layer}"].tensor_path.scale == block.first.item()
        assert sites[f"mlp_out.{layer}"].tensor_path.scale == block.second.item()
        assert str(sites[f"attn_out.{layer}"].tensor_path) == f"layers.{layer}.attn.output"
        assert f"resid_mid.{layer}" in sites


def test_a_contribution_that_is_added_twice_counts_twice():
    sites = resolve(Model(Twice))
    assert [sites[f"{name}.1"].tensor_path.scale for name in ("attn_out", "mlp_out")] == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [Hidden, OneChannel])
def test_a_small_addition_is_not_lost_in_rounding(block, seed):
    torch.manual_seed(seed)
    sites = resolve(Model(block).to(torch.bfloat16))
    for layer in range(3):
        for name, path in (("attn_out", "attn"), ("mlp_out", "mlp")):
            if f"{name}.{layer}" in sites:
                assert block is Hidden
                assert str(sites[f"{name}.{layer}"].tensor_path) == f"layers.{layer}.{path}.output"


@pytest.mark.parametrize("start", [0.7311, 1.0])
def test_changed_factors_are_proven_anew(start):
    model = Model(lambda: Gated(start))
    sites = resolve(model)
    assert resolve(model) is sites
    for block in model.layers:
        block.first.data.fill_(2.0)
    assert resolve(model)["attn_out.0"].tensor_path.scale == 2.0


def test_another_dtype_or_another_forward_is_proven_anew():
    model = Model()
    sites = resolve(model)
    assert "resid_mid.0" in sites
    assert resolve(model.to(torch.bfloat16)) is not sites
    for layer in model.layers:
        layer.forward = types.MethodType(lambda self, x: x + self.attn(self.n1(x)) + self.mlp(self.n2(x)), layer)
    with pytest.raises(SiteError, match="in parallel"):
        resolve(model)["resid_mid.0"]


def test_a_contribution_of_zeros_is_refused_and_proven_once_it_is_not_zero():
    model = Model()
    whole = model.state_dict()
    whole = {name: value.clone() for name, value in whole.items()}
    for layer in model.layers:
        nn.init.zeros_(layer.attn.o.weight)
        nn.init.zeros_(layer.attn.o.bias)
    found = places(resolve(model))
    for name in ("attn_in", "attn_z", "attn_out", "resid_mid"):
        assert found[name] == "layers.L.attn.output was all zero in the probe"
    assert found["mlp_out"] == "layers.L.mlp.output"
    assert resolve(model) is resolve(model), "nothing has changed"
    model.load_state_dict(whole)
    assert "attn_out.0" in resolve(model)


def silence(layer):
    """Make a layer's attention return zeros: its norm and biases are set to zero, its matrices are not."""
    with torch.no_grad():
        layer.n1.weight.zero_()
        layer.n1.bias.zero_()
        for module in layer.attn.modules():
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.zero_()


@pytest.mark.parametrize("change", ["data", "assigned", "another module"])
def test_sites_are_proven_again_however_zeros_end(change):
    model = Model()
    if change == "another module":
        list(map(silence, model.layers))
    else:
        for layer in model.layers:
            nn.init.zeros_(layer.attn.o.weight)
            nn.init.zeros_(layer.attn.o.bias)
    assert "attn_out.0" not in resolve(model)
    for layer in model.layers:
        if change == "data":
            layer.attn.o.weight.data.normal_()
        elif change == "assigned":
            layer.attn.o.weight = nn.Parameter(torch.randn(layer.attn.o.weight.shape))
        else:
            nn.init.ones_(layer.n1.weight)
    assert "attn_out.0" in resolve(model)


@pytest.mark.parametrize("name", ["bert", "roberta", "openai-gpt"])
def test_blocks_that_end_in_a_norm_leave_no_final_norm(name):
    reason = resolve(tiny_model(name)).refused[Site("final_norm")]
    assert reason == "the last block's output is normed already, and no other norm reads it"


@pytest.mark.parametrize("last", [nn.Identity, lambda width: nn.Linear(width, width)])
def test_without_a_norm_after_the_blocks_there_is_no_final_norm(last):
    assert resolve(Model(last=last)).refused[Site("final_norm")] == "no norm reads the last block's output"


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)])

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_only_the_number_of_the_block_is_written_as_L():
    sites = resolve(Model(lambda: Block(mlp=Numbered)))
    assert isinstance(sites, SiteMap)
    row = next(row for row in sites.rows() if row.name == "mlp_neurons")
    assert (row.layers, row.tensor_path) == ((0, 1, 2), "layers.L.mlp.parts.2.input")


def test_norms_keep_only_a_few_tokens_of_the_probe():
    model = tiny_model("llama")
    ids = torch.arange(8 * 64).view(8, 64) % 90 + 3
    subject = make_subject(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    kept = Norms(subject, trace(subject))._inputs
    assert kept["input_ids"].numel() <= 16 and kept["input_ids"].shape == kept["attention_mask"].shape
    assert kept["input_ids"].untyped_storage().nbytes() < ids.untyped_storage().nbytes()
    sites = resolve(model, inputs={"input_ids": ids})
    assert sites["resid_post.2|norm_no_gain"].tensor_path.transforms


class Checkpointed(GradientCheckpointingLayer):
    """A block of the class that transformers' metadata names."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Hybrid(nn.Module):
    """A block of another class in the same list, which contains a `Checkpointed`."""

    def __init__(self):
        super().__init__()
        self.inner = Checkpointed()

    def forward(self, x):
        return self.inner(x)


class Network(nn.Module):
    def __init__(self, layers, beside=()):
        super().__init__()
        self.embed, self.head = nn.Embedding(97, WIDTH), nn.Linear(WIDTH, 97)
        self.beside, self.layers = nn.ModuleList(beside), nn.ModuleList(layers)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.beside:  # their result only decides a condition
            x = layer(x)
        x = self.embed(input_ids) if self.beside and bool(x.isfinite().all()) else x
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_chain_does_not_leave_out_blocks_of_another_class():
    torch.manual_seed(0)
    sites = resolve(Network([Checkpointed(), Checkpointed(), Hybrid(), Checkpointed(), Checkpointed()]).eval())
    assert sites.n_layers == 5
    assert str(sites["resid_post.4"].tensor_path) == "layers.4.output"


def test_blocks_without_effect_on_the_logits_are_refused():
    torch.manual_seed(0)
    sites = resolve(Network([nn.Linear(WIDTH, WIDTH)], beside=[Checkpointed() for _ in range(3)]).eval())
    assert "resid_post.2" not in sites and "resid_pre.0" not in sites
    with pytest.raises(SiteError, match=r"beside\.0 \.\. beside\.2 has no effect on the logits"):
        sites["resid_post.1"]
