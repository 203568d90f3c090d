"""What `resolve` leaves behind, what it refuses, and how it deals with wrappers, devices and odd models."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import Site, SiteMap, Slot, resolve
from tests.support.tiny_models import tiny_model


def hooks_of(model):
    return [
        (name, hooks)
        for name, module in model.named_modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs)
        if hooks
    ]


@pytest.fixture
def model():
    return tiny_model("llama")


def test_leaves_nothing_behind(model):
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.config.attention_dropout = 0.5
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    names = list(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    resolve(model)
    assert torch.equal(torch.rand(3), expected)
    assert hooks_of(model) == []
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == names
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_disturb_the_proof():
    plain = tiny_model("gpt2")
    noisy = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    assert resolve(noisy).names() == resolve(plain).names()


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_in_any_gradient_mode(model, grad):
    with grad():
        assert "resid_mid.1" in resolve(model)


class Breaks(nn.Module):
    def forward(self, hidden):
        raise RuntimeError("out of order")


def test_failing_forward_is_explained_and_cleaned_up(model):
    model.train()
    model.model.layers[1].mlp = Breaks()
    with pytest.raises(SiteError) as caught:
        resolve(model)
    for part in (
        "LlamaForCausalLM",
        "RuntimeError: out of order",
        "resolve(model, inputs=batch)",
        "model.layers.3.output",
    ):
        assert part in str(caught.value)
    assert hooks_of(model) == []
    assert model.training
    assert model.model.layers[1].mlp.training


def test_cached_per_model_until_its_modules_change(model):
    sites = resolve(model)
    assert isinstance(sites, SiteMap)
    assert resolve(model) is sites
    assert resolve(tiny_model("llama")) is not sites
    model.model.layers[0].mlp.act_fn = nn.GELU()
    assert resolve(model) is not sites


def test_the_cache_does_not_keep_the_model():
    model = tiny_model("llama").model  # here the text model is the model itself
    sites, alive = resolve(model), weakref.ref(model)
    assert sites.text_model is model
    slot = sites["resid_post.0"]
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(SiteError, match="no longer exists"):
        slot.register(lambda x: None)
    with pytest.raises(SiteError, match="no longer exists"):
        _ = sites.text_model


def test_names_that_do_not_exist(model):
    sites = resolve(model)
    for name, hint in (
        ("resid_post.3", "the model has 3 layers, 0 to 2"),
        ("resid_pots.1", "Did you mean 'resid_post'"),
        ("model.layers.1.mpl.output", "Did you mean 'model.layers.1.mlp'"),
        ("model.layers.output", "did not run in the probe"),
    ):
        with pytest.raises(SiteError) as caught:
            sites[name]
        assert hint in str(caught.value)
        assert name not in sites


def test_refusals_say_why():
    with pytest.raises(SiteError, match="'resid_mid.1' could not be proven.*in parallel.*Proven: .*resid_post.L"):
        resolve(tiny_model("gptj"))["resid_mid.1"]
    with pytest.raises(SiteError, match="experts, not by a linear module"):
        resolve(tiny_model("mixtral"))["mlp_neurons.0"]


def test_path_sites(model):
    sites = resolve(model)
    slot = sites["model.layers.1.mlp.output"]
    assert isinstance(slot, Slot)
    assert sites[Site.parse("model.layers.1.mlp.output")].width == slot.width == 32
    assert sites["model.layers.1.self_attn.input"].tensor_path.keys == ("kwargs", "hidden_states")
    assert sites["model.layers.1.self_attn.output"].tensor_path.keys == (0,)
    assert slot.order == sites["mlp_out.1"].order < sites["model.layers.2.output"].order
    with pytest.raises(SiteError, match="no floating-point tensor of rank 2 or 3"):
        sites["model.embed_tokens.input"]
    for layer in model.model.layers:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
    with pytest.raises(SiteError, match="ran 3 times in one forward"):
        resolve(model)["model.layers.0.mlp.act_fn.output"]


def test_text_model_sees_the_ids_and_holds_the_blocks(model):
    assert resolve(model).text_model is model.model
    opt = tiny_model("opt")
    assert resolve(opt).text_model is opt.model.decoder


def test_multimodal_wrapper():
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = tiny_model("gemma3_text").config.to_dict() | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90)
    model = AutoModelForCausalLM.from_config(config)
    sites = resolve(model)
    assert str(sites["resid_post.1"].tensor_path) == "model.language_model.layers.1.output"
    assert sites.text_model is model.model
    assert sites.n_layers == 2


def test_own_inputs(model):
    sites = resolve(model, inputs={"input_ids": torch.tensor([[4, 9, 2, 7]])})
    assert resolve(model) is sites
    assert "resid_mid.0" in sites
    with pytest.raises(SiteError, match="'input_ids' or 'inputs_embeds'"):
        resolve(model, inputs={"attention_mask": torch.ones(1, 4)})


def test_too_short_inputs_are_named_as_the_reason(model):
    sites = resolve(model, inputs={"input_ids": torch.tensor([[4, 9, 2]])})
    for name in ("attn_z.0", "mlp_neurons.1"):
        with pytest.raises(SiteError, match=r"hold 3 tokens, too few .* 4 tokens or more"):
            sites[name]
    assert "mlp_neurons.1" in resolve(model, inputs={"input_ids": torch.tensor([[4, 9, 2, 7]])})


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where, tmp_path):
    plain = resolve(tiny_model("qwen2"))
    model = tiny_model("qwen2")
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    sites = resolve(model)
    assert sites.names() == plain.names()
    assert hooks_of(model) == []


class Adapted(nn.Module):
    """Wraps a model as PEFT does."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class LowRank(nn.Module):
    """Replaces a linear module, as a LoRA layer does."""

    def __init__(self, linear, zero):
        super().__init__()
        self.base_layer = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("zero", [False, True])
def test_adapters_are_seen_as_one_linear_module(model, zero):
    sites = resolve(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj = LowRank(layer.self_attn.o_proj, zero)
    adapted = resolve(Adapted(model))
    assert resolve(model) is adapted
    assert adapted is not sites
    assert adapted.names() == sites.names()
    assert str(adapted["attn_z.1"].tensor_path) == "model.layers.1.self_attn.o_proj.input"


def test_compiled_model_is_unwrapped(model):
    compiled = torch.compile(model, backend="eager")
    assert resolve(compiled) is resolve(model)
    model.compile(backend="eager")
    model.model.layers[0].mlp.act_fn = nn.GELU()
    assert "resid_mid.0" in resolve(model)


def test_data_parallel_is_refused(model):
    with pytest.raises(SiteError, match="DDP or device_map"):
        resolve(nn.DataParallel(model))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + self.linear(hidden)


class Stack(nn.Module):
    """A language model in which `go` decides how the blocks are called."""

    def __init__(self, go, blocks=3):
        super().__init__()
        self.config = SimpleNamespace(to_dict=dict, get_text_config=lambda: None, vocab_size=50)
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(Layer(8) for _ in range(blocks))
        self.head = nn.Linear(8, 50)
        self.go = go

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return self.head(self.go(self, self.embed(input_ids)))


def once(model, hidden):
    for block in model.blocks:
        hidden = block(hidden)
    return hidden


def twice(model, hidden):
    return once(model, once(model, hidden))


def streams(model, hidden):
    return once(model, hidden.unsqueeze(2).expand(-1, -1, 4, -1).contiguous()).sum(2)


def rescaled(model, hidden):
    for block in model.blocks:
        hidden = block(hidden) * 0.75
    return hidden


def test_unknown_architecture_with_a_plain_stream():
    model = Stack(once)
    sites = resolve(model)
    assert "resid_post.2" in sites
    assert "mlp_out.1" in sites  # acts on each token alone
    with pytest.raises(SiteError, match="nothing in it mixes positions"):
        sites["attn_out.1"]


@pytest.mark.parametrize(
    ("go", "reason"),
    [
        (twice, "ran 2 times in one forward"),
        (streams, "more than one residual stream"),
        (rescaled, "not bitwise the input of the next block"),
    ],
)
def test_no_single_stream_no_semantic_sites(go, reason):
    model = Stack(go)
    sites = resolve(model)
    assert sites.names() == []
    with pytest.raises(SiteError, match=reason):
        sites["resid_post.1"]
    assert "head.input" in sites
