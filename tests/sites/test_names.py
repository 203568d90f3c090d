"""Names of other libraries, read as sites."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.errors import CheckpointError, SiteError, UnknownNameError
from hf_gated_sae.hub.hook_names import site_of_hook
from hf_gated_sae.sites import Site, read_name, resolve
from hf_gated_sae.sites.names import explain, libraries
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])

SAID = [
    ("transformer_lens", "blocks.12.hook_resid_post", "resid_post.12"),
    ("transformer_lens", "blocks.0.hook_resid_pre", "resid_pre.0"),
    ("transformer_lens", "blocks.3.hook_attn_out", "attn_out.3"),
    ("transformer_lens", "blocks.3.hook_mlp_out", "mlp_out.3"),
    ("transformer_lens", "blocks.0.attn.hook_z", "attn_z.0"),
    ("transformer_lens", "blocks.0.attn.o.hook_in", "attn_z.0"),
    ("transformer_lens", "blocks.0.mlp.hook_in", "mlp_in.0"),
    ("transformer_lens", "blocks.0.mlp.hook_post", "mlp_neurons.0"),
    ("transformer_lens", "blocks.0.hook_mlp_in", "resid_mid.0"),
    ("transformer_lens", "blocks.4.ln1.hook_normalized", "resid_pre.4|norm_no_gain"),
    ("transformer_lens", "blocks.4.ln2.hook_normalized", "resid_mid.4|norm_no_gain"),
    ("transformer_lens", "hook_embed", "embed"),
    ("transformer_lens", "unembed.hook_in", "final_norm"),
    ("transformer_lens_bridge", "blocks.0.hook_mlp_in", "mlp_in.0"),
    ("transformer_lens_bridge", "blocks.0.hook_out", "resid_post.0"),
    ("saelens", "blocks.7.hook_resid_pre", "resid_pre.7"),
    ("saelens", "model.layers.7", "resid_post.7"),
    ("sparsify", "layers.10", "resid_post.10"),
    ("sparsify", "h.10", "resid_post.10"),
    ("sparsify", "layers.10.mlp", "layers.10.mlp.output"),
    ("sparsify", "layers.3.attention", "layers.3.attention.output"),
    ("nnterp", "layers_output[3]", "resid_post.3"),
    ("nnterp", "model.layers_input[3]", "resid_pre.3"),
    ("nnterp", "layers[3].output", "resid_post.3"),
    ("nnterp", "mlps_input[3]", "mlp_in.3"),
    ("nnterp", "attentions[3].input", "attn_in.3"),
    ("nnterp", "layers[3].mlp.input", "mlp_in.3"),
    ("nnterp", "token_embeddings", "embed"),
    ("nnterp", "ln_final.output", "final_norm"),
    ("interp_engine", "resid_post.3", "resid_post.3"),
    ("interp_engine", "mlp_out_post.3", "mlp_out.3"),
    ("interp_engine", "attn_out_post.3", "attn_out.3"),
    ("interp_engine", "z.3", "attn_z.3"),
    ("interp_engine", "mlp_act.3", "mlp_neurons.3"),
    ("interp_engine", "embeddings", "embed"),
    ("interp_engine", "path.model.layers.5.mlp.down_proj", "model.layers.5.mlp.down_proj.output"),
]


@pytest.mark.parametrize(("library", "name", "site"), SAID)
def test_names_that_need_no_model(library, name, site):
    assert str(read_name(name, library)) == site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("hook_resid_mid", "resid_mid.5"),
        ("mlp.hook_in", "mlp_in.5"),
        ("ln2.hook_normalized", "resid_mid.5|norm_no_gain"),
        ("hook_mlp_out", "mlp_out.5"),
    ],
)
def test_circuit_tracers_names_need_the_layer(name, site):
    assert str(read_name(name, "circuit_tracer", layer=5)) == site
    with pytest.raises(SiteError, match="in some block L; say which, with layer="):
        read_name(name, "circuit_tracer")


def test_the_layer_may_be_given_separately():
    assert str(read_name("blocks.{layer}.hook_resid_post", "saelens", layer=4)) == "resid_post.4"
    assert str(read_name("blocks.4.hook_resid_post", layer=4)) == "resid_post.4"
    with pytest.raises(SiteError, match="names layer 4, and layer=5 was given"):
        read_name("blocks.4.hook_resid_post", layer=5)


def test_without_a_library_our_own_names_and_unambiguous_ones_are_read():
    assert str(read_name("mlp_out.3")) == "mlp_out.3"
    assert str(read_name("resid_post.3|center")) == "resid_post.3|center"
    assert str(read_name("blocks.3.hook_mlp_out")) == "mlp_out.3"
    assert str(read_name("layers_output[3]")) == "resid_post.3"
    with pytest.raises(SiteError, match="name of 'resid_mid.3' and TransformerBridge's .* say which"):
        read_name("blocks.3.hook_mlp_in")


RAW = [
    ("nnterp", "mlps_output[1]"),
    ("nnterp", "layers[1].mlp.output"),
    ("transformer_lens", "blocks.1.mlp.hook_out"),
    ("interp_engine", "mlp_out.1"),
]


@pytest.mark.parametrize(("library", "name"), RAW)
def test_names_of_the_raw_output_of_a_module_need_the_model(library, name):
    """In Gemma 2 a norm follows, and in BLOOM this output is the whole stream."""
    gemma, bloom = tiny_model("gemma2"), tiny_model("bloom")
    assert str(read_name(name, library, model=gemma)) == "model.layers.1.mlp.output"
    sites = resolve(bloom)
    site = read_name(name, library, model=sites)
    assert str(site) == "transformer.h.1.mlp.output"
    assert torch.equal(captured(bloom, site), captured(bloom, "resid_post.1"))
    assert not torch.equal(captured(bloom, site), captured(bloom, "mlp_out.1"))
    with pytest.raises(SiteError, match="another module in every family: give the model"):
        read_name(name, library)


@pytest.mark.parametrize("name", ["attentions_output[1]", "blocks.1.attn.hook_out"])
def test_raw_attention(name):
    assert str(read_name(name, model=tiny_model("gemma2"))) == "model.layers.1.self_attn.output"


def captured(model, site):
    found = []
    handle = resolve(model)[site].register(lambda value: found.append(value.clone()))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return found[0]


def test_the_number_of_the_last_block_comes_from_the_model():
    model = tiny_model("llama")
    assert str(read_name("ln_final.hook_normalized", model=model)) == "resid_post.2|norm_no_gain"
    normed = captured(model, read_name("ln_final.hook_normalized", model=model))
    torch.testing.assert_close(normed * model.model.norm.weight.detach(), captured(model, "final_norm"))


def test_in_a_model_only_proven_sites_are_returned():
    neox = tiny_model("gpt_neox")
    with pytest.raises(SiteError, match="'resid_mid.1' could not be proven"):
        read_name("blocks.1.hook_resid_mid", model=neox)
    with pytest.raises(SiteError, match="has 3 layers"):
        read_name("layers_output[3]", model=neox)


@pytest.mark.parametrize(
    ("name", "library", "hint"),
    [
        ("blocks.3.hook_resid_pots", None, "Did you mean 'blocks.L.hook_resid_post'"),
        ("blocks.3.hook_resid_pots", "transformer_lens", "Did you mean 'blocks.L.hook_resid_post'"),
        ("layer_output[3]", "nnterp", r"Did you mean 'layers_output\[L\]'"),
        ("blocks.3.attn.hook_q", None, "nor a known name of"),
        ("resid_post.3.stream-2", "interp_engine", "not a known name of interp-engine"),
        ("nonsense", None, "is not a site, nor"),
        ("", "saelens", "not a known name of SAELens"),
        (3, None, "The name is 3; expected a string"),
    ],
)
def test_unknown_names(name, library, hint):
    with pytest.raises(SiteError, match=hint):
        read_name(name, library)


def test_unknown_libraries():
    with pytest.raises(UnknownNameError, match="Did you mean 'nnterp'"):
        read_name("layers_output[3]", "nnterpp")


def test_every_library_has_names_here():
    """Except circuit-tracer, which needs the layer: see `test_circuit_tracers_names_need_the_layer`."""
    missing = set(libraries) - {library for library, _, _ in SAID} - {"circuit_tracer"}
    assert not missing, f"add names of {sorted(missing)} to SAID"


def test_names_in_checkpoints_are_read_in_the_same_way():
    """Checkpoint formats and this reader use one table."""
    for library, name, site in SAID:
        if library == "transformer_lens":
            try:
                place, normalization = site_of_hook(name)
            except CheckpointError:
                continue  # outside the blocks
            assert site == place + ("|norm_no_gain" if normalization == "rms_norm" else "")


def test_site_errors_name_the_library():
    for text in ("blocks.1.hook_resid_post", "layers.1", "layers_output[1]", "z.1", "mlps_output[1]"):
        assert explain(text)
        with pytest.raises(SiteError, match="is not a site: it is .*'s name of .*read_name"):
            Site.parse(text)
    assert explain("resid_pots.3") == ""


@given(st.sampled_from([None, *sorted(libraries)]), st.text(max_size=20))
def test_any_text_is_read_or_refused(library, text):
    try:
        site = read_name(text, library)
    except SiteError:
        return
    assert Site.parse(str(site)) == site
