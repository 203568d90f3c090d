"""Every family: the proven places are the right ones, checked with hooks written by hand and a table made by hand."""

import pytest
import torch

from hf_gated_sae.sites import Site, resolve
from hf_gated_sae.sites.site import LAYERED
from tests.support.tiny_models import LAYERS, TINY_NAMES, tiny_model

IDS = torch.tensor([[11, 54, 33, 78, 90], [60, 41, 22, 13, 5]])

# Blocks; within a block, what is added for attention and feed-forward; and the modules whose inputs are z and neurons.
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
}
PARALLEL = {"gpt_neox", "gptj", "falcon", "falcon_new", "phi", "cohere"}
REFUSED = {
    **{name: {"resid_mid"} for name in PARALLEL},
    "opt": {"mlp_in"},
    "mamba": {"resid_mid", "mlp_in", "mlp_neurons", "mlp_out"},
    "mixtral": {"mlp_neurons"},
    "qwen3_moe": {"mlp_neurons"},
    "gpt_oss": {"mlp_neurons"},
}


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


@pytest.mark.parametrize("name", TINY_NAMES)
def test_all_sites_are_proven_or_refused_as_expected(name):
    sites = resolve(tiny_model(name))
    assert sites.n_layers == LAYERS
    names = sites.names()
    refused = REFUSED.get(name, set())
    for kind in LAYERED:
        if (name, kind) == ("llama4_text", "mlp_neurons"):
            continue  # its blocks alternate between a plain feed-forward and experts
        expected = [] if kind in refused else [f"{kind}.{layer}" for layer in range(LAYERS)]
        assert [site for site in names if site.startswith(f"{kind}.")] == expected
    assert names[0] == "embed"
    assert names[-1] == "final_norm"
    assert [sites[site].order for site in names] == sorted(sites[site].order for site in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_those_of_the_hand_made_table(name):
    blocks, attention, mlp, z, neurons = FAMILIES[name]
    sites = resolve(tiny_model(name))
    for layer in range(2):
        path = f"{blocks}.{layer}."
        for site, module in (("attn_out", attention), ("mlp_out", mlp)):
            if module:
                assert str(sites[f"{site}.{layer}"].place) == f"{path}{module}.output"
        for site, module in (("attn_z", z), ("mlp_neurons", neurons)):
            if module:
                assert str(sites[f"{site}.{layer}"].place) == f"{path}{module}.input"


@pytest.mark.parametrize("name", TINY_NAMES)
def test_residual_sites_equal_a_hand_made_hook(name):
    model = tiny_model(name)
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


@pytest.mark.parametrize("name", TINY_NAMES)
def test_contributions_add_up_on_another_batch(name):
    model = tiny_model(name)
    sites = resolve(model)
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    seen = capture(model, [f"{k}.{i}" for k in kinds for i in range(LAYERS) if f"{k}.{i}" in sites])
    for layer in range(LAYERS):
        total = seen[f"resid_pre.{layer}"] + seen[f"attn_out.{layer}"]
        if f"resid_mid.{layer}" in seen:
            torch.testing.assert_close(seen[f"resid_mid.{layer}"], total)
        if f"mlp_out.{layer}" in seen:
            total = total + seen[f"mlp_out.{layer}"]
        torch.testing.assert_close(seen[f"resid_post.{layer}"], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_site_can_be_written(name):
    model = tiny_model(name)
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


@pytest.mark.parametrize("name", [n for n in TINY_NAMES if n not in PARALLEL | {"mamba"}])
def test_write_to_resid_mid_reaches_both_stream_and_feed_forward(name):
    model = tiny_model(name)
    sites = resolve(model)
    seen = {}
    written = torch.randn(2, 5, sites["resid_mid.1"].width)
    handles = [
        sites["resid_mid.1"].register(lambda x: written, lambda: IDS.shape),
        sites["mlp_out.1"].register(lambda x: seen.update(mlp=x.clone()), lambda: IDS.shape),
        sites["resid_post.1"].register(lambda x: seen.update(post=x.clone())),
    ]
    clean = capture(tiny_model(name), ["mlp_out.1"])["mlp_out.1"]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["post"], written + seen["mlp"])
    assert not torch.allclose(seen["mlp"], clean)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_sites_hold_with_cache_in_generation(name):
    model = tiny_model(name)
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


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_proves_the_same_sites(name, dtype):
    assert resolve(tiny_model(name).to(dtype)).names() == resolve(tiny_model(name)).names()


def test_scaled_contributions_are_what_is_added():
    model = tiny_model("granite")
    seen = capture(model, ["attn_out.1", "model.layers.1.self_attn.output"])
    assert torch.equal(seen["attn_out.1"], seen["model.layers.1.self_attn.output"] * 0.22)
    assert resolve(model)["attn_out.1"].place.scale == 0.22


@pytest.mark.parametrize("name", ["stablelm", "gpt_neox"])
def test_layout_follows_the_configuration(name):
    for parallel in (True, False):
        sites = resolve(tiny_model(name, use_parallel_residual=parallel))
        assert ("resid_mid.0" in sites) is not parallel


def test_widths_are_those_of_the_tensors():
    sites = resolve(tiny_model("qwen3"))
    widths = {kind: sites[f"{kind}.0"].width for kind in LAYERED}
    assert widths == dict.fromkeys(LAYERED, 32) | {"attn_z": 64, "mlp_neurons": 48}
    assert sites[Site.parse("embed")].width == 32
