"""Every family: proven sites are checked with hand-made hooks and a hand-made table of tensor paths."""

import functools

import pytest
import torch

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import Site, resolve
from hf_gated_sae.sites.site import LAYERED
from tests.support.tiny_models import LAYERS, TINY_NAMES, tiny_model

pytestmark = pytest.mark.slow

IDS = torch.tensor([[11, 54, 33, 78, 90], [60, 41, 22, 13, 5]])

# The blocks; in a block, the modules whose outputs are attn_out and mlp_out, and those whose inputs are z and neurons.
FAMILIES = {
    "gpt2": ("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("transformer.h", "attn", "mlp", "attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers",
        "post_attention_dropout",
        "post_mlp_dropout",
        "attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "gptj": ("transformer.h", "attn", "mlp", "attn.out_proj", "mlp.fc_out"),
    "opt": ("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", "fc2"),
    "bloom": (
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "falcon": ("transformer.h", "self_attention", "mlp", "self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks", "resid_attn_dropout", "ffn.down_proj", "attn.out_proj", "ffn.down_proj"),
    "llama": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "mixtral": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", None),
    "qwen3": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": (
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "olmo2": (
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "glm4": ("model.layers", "post_self_attn_layernorm", "post_mlp_layernorm", "self_attn.o_proj", "mlp.down_proj"),
    "phi": ("model.layers", "self_attn", "mlp", "self_attn.dense", "mlp.fc2"),
    "cohere": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "gpt_oss": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", None),
    "mamba": ("backbone.layers", "mixer", None, "mixer.out_proj", None),
    "recurrent_gemma": (
        "model.layers",
        "temporal_block",
        "mlp_block",
        "temporal_block.linear_out",
        "mlp_block.down_proj",
    ),
    "opt_post_norm": ("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", "fc2"),
    "openai-gpt": ("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj"),
    "bert": (
        "bert.encoder.layer",
        "attention.output.dropout",
        "output.dropout",
        "attention.output.dense",
        "output.dense",
    ),
    "roberta": (
        "roberta.encoder.layer",
        "attention.output.dropout",
        "output.dropout",
        "attention.output.dense",
        "output.dense",
    ),
    "roberta-prelayernorm": (
        "roberta_prelayernorm.encoder.layer",
        "attention.output.dropout",
        "output.dropout",
        "attention.output.dense",
        "output.dense",
    ),
    "doge": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "rwkv": ("rwkv.blocks", "attention", "feed_forward", "attention.output", None),
    "beam": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj", None),
    "gemma3": (
        "model.language_model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "gemma4_text": ("model.layers", "post_attention_layernorm", None, "self_attn.o_proj", None),
    "falcon_h1": ("model.layers", None, "feed_forward", None, "feed_forward.down_proj"),
    "deepseek_v3": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", None),
    "bitnet": ("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "exaone4": (
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
}
PARALLEL = {"gpt_neox", "gptj", "falcon", "falcon_new", "phi", "cohere"}
SEVERAL_STREAMS = {"deepseek_v4"}
SINGLE = {"mamba", "nemotron_h"}
NAMES = [name for name in TINY_NAMES if name not in SEVERAL_STREAMS]

# Families that norm the stream after each addition, with these norms; `CHANGED` adds those that change it otherwise.
NORMED_AFTER = {
    "opt_post_norm": ("self_attn_layer_norm", "final_layer_norm"),
    "openai-gpt": ("ln_1", "ln_2"),
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
}
CHANGED = {*NORMED_AFTER, "minimax", "doge", "beam", "rwkv", "gemma4_text"}

MLP = {"mlp_in", "mlp_neurons", "mlp_out"}
REFUSED = {
    **{name: {"resid_mid"} for name in PARALLEL},
    "opt": {"mlp_in"},
    "opt_post_norm": {"mlp_in"},
    "mamba": {"resid_mid", *MLP},
    "gemma4_text": MLP,
    "granitemoehybrid": MLP,
    "falcon_h1": {"attn_in", "attn_z", "attn_out"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "minimax", "rwkv"), {"mlp_neurons"}),
}
# Families whose blocks differ: the layers in which a kind of site is proven, if not all.
SOME = {
    "llama4_text": {"mlp_neurons": [0, 2]},
    "jamba": {"mlp_neurons": [0, 2]},
    "deepseek_v3": {"mlp_neurons": [0]},
    "beam": {"mlp_neurons": [0]},
    "gpt_neox_japanese": dict.fromkeys(("attn_in", "attn_z", "attn_out", "resid_mid", *MLP), [0, 1]),
    "nemotron_h": dict.fromkeys(("attn_in", "attn_z", "attn_out"), [0, 1])
    | dict.fromkeys(MLP, [2])
    | {"resid_mid": []},
}


@functools.lru_cache(maxsize=len(TINY_NAMES))
def shared(name):
    """Return a model that tests only read; its sites are resolved once."""
    return tiny_model(name)


def first_tensor(value):
    return value if isinstance(value, torch.Tensor) else value[0]


def capture(model, names, ids=IDS):
    """Return what the slots of the names see in one forward."""
    sites, seen, handles = resolve(model), {}, []
    for name in names:
        handles.append(sites[name].register(lambda x, name=name: seen.update({name: x.clone()}), lambda: ids.shape))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_all_sites_are_proven_or_refused_as_expected(name):
    sites = resolve(shared(name))
    assert sites.n_layers == LAYERS
    names = sites.names()
    refused = REFUSED.get(name, set())
    for kind in LAYERED:
        layers = SOME.get(name, {}).get(kind, [] if kind in refused else range(LAYERS))
        expected = [f"{kind}.{layer}" for layer in layers]
        assert [site for site in names if site.startswith(f"{kind}.")] == expected
    assert names[0] == "embed"
    assert names[-1] == ("resid_post.2" if name in NORMED_AFTER else "final_norm")
    assert [sites[site].order for site in names] == sorted(sites[site].order for site in names)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in NAMES])
def test_tensor_paths_are_those_of_the_hand_made_table(name):
    blocks, attention, mlp, z, neurons = FAMILIES[name]
    sites = resolve(shared(name))
    for layer in range(2):
        path = f"{blocks}.{layer}."
        for site, module in (("attn_out", attention), ("mlp_out", mlp)):
            if module:
                assert str(sites[f"{site}.{layer}"].tensor_path) == f"{path}{module}.output"
        for site, module in (("attn_z", z), ("mlp_neurons", neurons)):
            if module:
                assert str(sites[f"{site}.{layer}"].tensor_path) == f"{path}{module}.input"


@pytest.mark.parametrize("name", NAMES)
def test_residual_sites_equal_a_hand_made_hook(name):
    model = shared(name)
    block = FAMILIES[name][0] if name in FAMILIES else None
    blocks = (
        model.get_submodule(block)
        if block
        else next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    )
    plain = {}
    handles = []
    for layer, module in enumerate(blocks):
        handles.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out, layer=layer: plain.update(
                    {f"resid_pre.{layer}": args[0].clone(), f"resid_post.{layer}": first_tensor(out).clone()}
                ),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    seen = capture(model, plain)
    assert set(seen) == set(plain)
    for site, value in plain.items():
        assert torch.equal(seen[site], value), site
    for layer in range(LAYERS - 1):
        assert torch.equal(seen[f"resid_pre.{layer + 1}"], seen[f"resid_post.{layer}"])


def stream(model):
    """Return the values at all proven sites of the stream, one dictionary per block; the batch is not the probe's."""
    sites = resolve(model)
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    seen = capture(model, [f"{k}.{i}" for k in kinds for i in range(LAYERS) if f"{k}.{i}" in sites])
    return [{k: seen[f"{k}.{i}"] for k in kinds if f"{k}.{i}" in seen} for i in range(LAYERS)]


close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CHANGED | {"falcon_h1", "granitemoehybrid"}])
def test_contributions_add_up_on_another_batch(name):
    for layer, block in enumerate(stream(shared(name))):
        if layer not in SOME.get(name, {}).get("attn_out", range(LAYERS)) and name not in SINGLE:
            continue
        nothing = torch.zeros_like(block["resid_pre"])
        total = block["resid_pre"] + block.get("attn_out", nothing)
        close(block.get("resid_mid", total), total)
        close(block["resid_post"], total + block.get("mlp_out", nothing))


def test_a_single_contribution_adds_up_beside_two_of_the_other_kind():
    for block in stream(shared("granitemoehybrid")):
        close(block["resid_mid"], block["resid_pre"] + block["attn_out"])
    for block in stream(shared("falcon_h1")):
        close(block["resid_post"], block["resid_mid"] + block["mlp_out"])
    reason = resolve(shared("falcon_h1")).refused[Site("attn_out", 1)]
    assert "layers.1.mamba.output" in reason and "layers.1.self_attn.output" in reason


@pytest.mark.parametrize("name", NORMED_AFTER)
@torch.no_grad()
def test_with_norms_after_the_addition_the_stream_is_their_output(name):
    model = shared(name)
    for layer, block in enumerate(stream(model)):
        path = f"{FAMILIES[name][0]}.{layer}"
        first, second = (model.get_submodule(f"{path}.{norm}") for norm in NORMED_AFTER[name])
        close(block["resid_mid"], first(block["resid_pre"] + block["attn_out"]))
        close(block["resid_post"], second(block["resid_mid"] + block["mlp_out"]))


@torch.no_grad()
def test_with_norms_before_the_addition_contributions_are_added_to_their_output():
    model = shared("minimax")
    for layer, block in enumerate(stream(model)):
        module = model.model.layers[layer]
        keep = 3.5 if layer != 1 else 1.0
        close(block["resid_mid"], keep * module.input_layernorm(block["resid_pre"]) + block["attn_out"])
        close(block["resid_post"], 1.5 * module.post_attention_layernorm(block["resid_mid"]) + block["mlp_out"])
    model = shared("rwkv")
    first, second, _ = stream(model)
    close(first["resid_mid"], model.rwkv.blocks[0].pre_ln(first["resid_pre"]) + first["attn_out"])
    close(second["resid_mid"], second["resid_pre"] + second["attn_out"])


@torch.no_grad()
def test_a_scaled_stream_is_proven_with_its_scale():
    model = shared("doge")
    for layer, block in enumerate(stream(model)):
        module = model.model.layers[layer]
        close(block["resid_mid"], module.input_residual * block["resid_pre"] + block["attn_out"])
        close(block["resid_post"], module.post_attention_residual * block["resid_mid"] + block["mlp_out"])
    for layer, block in enumerate(stream(shared("beam"))) if "beam" in NAMES else ():
        first, second = ((k - 1) ** 0.5 / k**0.5 for k in (2 * layer + 2, 2 * layer + 3))
        close(block["resid_mid"], first * block["resid_pre"] + block["attn_out"])
        close(block["resid_post"], second * block["resid_mid"] + block["mlp_out"])
    for block in stream(shared("gemma4_text")):
        close(block["resid_mid"], block["resid_pre"] + block["attn_out"])


def test_several_streams_are_refused_but_blocks_are_known():
    model = shared("deepseek_v4")
    sites = resolve(model)
    assert sites.n_layers == LAYERS
    assert sites.names() == []
    with pytest.raises(SiteError, match=r"\[2, 7, 4, 32\], more than one residual stream"):
        sites["resid_post.1"]
    assert sites["model.layers.1.self_attn.output"].width == 32


def test_blocks_that_text_does_not_run_keep_their_number():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].forward, model.model.forward = None, without(model.model, 1)
    sites = resolve(model)
    assert sites.n_layers == LAYERS
    assert {name for name in sites.names() if name.startswith("attn_out")} == {"attn_out.0", "attn_out.2"}
    assert str(sites["resid_pre.2"].tensor_path) == "model.layers.2.input"
    with pytest.raises(SiteError, match="does not run on text alone"):
        sites["resid_post.1"]


def without(base, skipped):
    """Return the forward of a model that leaves a block out."""
    whole, plain = base.layers, base.forward

    def forward(*args, **kwargs):
        base.layers = torch.nn.ModuleList(block for layer, block in enumerate(whole) if layer != skipped)
        try:
            return plain(*args, **kwargs)
        finally:
            base.layers = whole

    return forward


@pytest.mark.parametrize("name", NAMES)
def test_every_site_can_be_written(name):
    model = shared(name)
    sites = resolve(model)
    with torch.no_grad():
        clean = model(input_ids=IDS, use_cache=False).logits
        for site in sites.names():
            for edit, same in (
                (torch.clone, True),
                (lambda x: None, True),
                (lambda x: x + 0.5 * x.roll(1, -1), False),
            ):
                handle = sites[site].register(edit, lambda: IDS.shape)
                logits = model(input_ids=IDS, use_cache=False).logits
                handle.remove()
                assert torch.equal(logits, clean) is same, site


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PARALLEL | SINGLE | CHANGED | {"granitemoehybrid"}])
def test_write_to_resid_mid_reaches_both_stream_and_feed_forward(name):
    model = shared(name)
    sites = resolve(model)
    seen = {}
    clean = capture(model, ["mlp_out.1"])["mlp_out.1"]
    written = torch.randn(2, 5, sites["resid_mid.1"].width)
    handles = [
        sites["resid_mid.1"].register(lambda x: written, lambda: IDS.shape),
        sites["mlp_out.1"].register(lambda x: seen.update(mlp=x.clone()), lambda: IDS.shape),
        sites["resid_post.1"].register(lambda x: seen.update(post=x.clone())),
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["post"], written + seen["mlp"])
    assert not torch.allclose(seen["mlp"], clean)


@pytest.mark.parametrize("name", NAMES)
def test_sites_hold_with_cache_in_generation(name):
    model = shared(name)
    sites = resolve(model)
    shape = []
    top = sites.text_model.register_forward_pre_hook(
        lambda m, a, k: shape.append((k["input_ids"] if "input_ids" in k else a[0]).shape), with_kwargs=True
    )
    fired = dict.fromkeys(sites.names(), 0)
    handles = [
        sites[site].register(lambda x, site=site: fired.update({site: fired[site] + 1}), lambda: tuple(shape[-1]))
        for site in sites.names()
    ]
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for handle in (top, *handles):
        handle.remove()
    assert set(fired.values()) == {4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_proves_the_same_sites(name, dtype):
    assert resolve(tiny_model(name).to(dtype)).names() == resolve(shared(name)).names()


def test_scaled_contributions_are_what_is_added():
    model = shared("granite")
    seen = capture(model, ["attn_out.1", "model.layers.1.self_attn.output"])
    assert torch.equal(seen["attn_out.1"], seen["model.layers.1.self_attn.output"] * 0.22)
    assert resolve(model)["attn_out.1"].tensor_path.scale == 0.22


@pytest.mark.parametrize("name", ["stablelm", "gpt_neox"])
def test_layout_follows_the_configuration(name):
    for parallel in (True, False):
        sites = resolve(tiny_model(name, use_parallel_residual=parallel))
        assert ("resid_mid.0" in sites) is not parallel


def test_widths_are_those_of_the_tensors():
    sites = resolve(shared("qwen3"))
    widths = {kind: sites[f"{kind}.0"].width for kind in LAYERED}
    assert widths == dict.fromkeys(LAYERED, 32) | {"attn_z": 64, "mlp_neurons": 48}
    assert sites[Site.parse("embed")].width == 32
