"""The check of attach() distinguishes an SAE's own site from nearby sites, where FVU is nearly as low."""

import warnings

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gated_sae import SAEModel, Splice, attach, resolve
from hf_gated_sae.demo.bundled import MODEL, SAES
from hf_gated_sae.errors import SiteError
from hf_gated_sae.hooks.alternative_sites import far_sites, near_sites
from tests.hooks.support import make_sae, model_of


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def bundled(name, site):
    sae = SAEModel.from_pretrained(SAES / name)
    sae.config.site = site
    return sae


def unrecorded(name, site):
    """A copy of the SAE without its checkpoint, and so without recorded metrics."""
    sae = bundled(name, site)
    copy = type(sae)(type(sae.config).from_dict(sae.config.to_dict())).eval()
    copy.load_state_dict(sae.state_dict())
    return copy


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resid_post.1/gated", "resid_post.0"),  # FVU is 0.14; 0.09 was recorded
        ("resid_post.1/standard", "resid_mid.1"),
        ("mlp_out.2/standard", "mlp_out.0"),  # two layers away; FVU is 0.80, and 0.33 was recorded
        ("mlp_out.2/gated", "mlp_out.0"),
    ],
)
def test_a_nearby_site_with_higher_fvu_is_an_error(language_model, name, given):
    sae, right = bundled(name, given), name.split("/")[0]
    with pytest.raises(SiteError, match=f"does not fit {given}: .*At '{right}' FVU is .*did you mean that site"):
        attach(language_model, Splice(sae))
    sae.config.site = right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(language_model, Splice(sae)).checks[0].verdict == "it fits"


def test_a_nearby_site_with_hardly_higher_fvu_is_warned_about_once(language_model):
    sae = unrecorded("resid_post.1/gated", "resid_post.0")
    sae.config.recorded_fvu = 0.094  # without a norm, which would be stronger evidence
    with pytest.warns(UserWarning, match=r"may not belong at resid_post.0: .*At 'resid_post.1' .*Set sae.config.site"):
        attach(language_model, Splice(sae))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [check] = attach(language_model, Splice(sae)).checks
    assert check.verdict == "it seems to belong to resid_post.1"


@pytest.mark.parametrize("given", ["resid_post.0", "resid_mid.1"])
def test_without_recorded_metrics_a_site_with_low_fvu_is_accepted(language_model, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(language_model, Splice(unrecorded("resid_post.1/gated", given))).checks[0].verdict == "it fits"


SHORT_IN_NORM = """<|endoftext|>   take baz.take as the   # baz, baz.take, and the take, take bar as the
   taken bound.bar as foo   # bound, bound.bar, and foo taken, bar and as foo
   bound import.the as take  # import, import.the, and take bound, the import as take
   taken two.three as bar # two, two.three, and bar taken, three take as bar
   """


def test_a_transform_of_the_own_site_is_not_preferred_for_its_norm(language_model):
    """On this text FVU is 0.31 (recorded: 0.18) and the norm 8.4 (recorded: 10.3); with unit_norm it is near 10.3."""
    sae = bundled("mlp_out.2/gated", "mlp_out.2")
    text = AutoTokenizer.from_pretrained(MODEL)(SHORT_IN_NORM, return_tensors="pt")["input_ids"][:, :127]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [check] = attach(language_model, Splice(sae), check=text).checks
    assert check.fvu > 1.5 * check.expected_fvu and "no nearby site fits better" in check.verdict


def test_the_same_text_gives_the_same_numbers(language_model):
    first, second = (
        attach(language_model, Splice(bundled("resid_post.1/gated", "resid_post.1"))).checks for _ in range(2)
    )
    assert first == second and first is not second


def test_near_sites_are_in_adjacent_layers_or_the_same_layer():
    near = near_sites(resolve(model_of("llama")), make_sae(site="resid_post.1"))
    assert set(near.slots) == {
        *("resid_post.0", "resid_post.2"),
        *("resid_pre.1", "attn_in.1", "attn_z.1", "attn_out.1", "resid_mid.1", "mlp_in.1", "mlp_out.1"),
    }
    assert all(pair.read == pair.written for [stage] in [near.stages] for pair in stage)


def test_near_sites_of_a_module_path_or_a_transform_are_of_the_same_kind():
    found = resolve(model_of("llama"))
    path = near_sites(found, make_sae(site="model.layers.1.self_attn.output")).slots
    assert {"model.layers.0.self_attn.output", "model.layers.2.self_attn.output", "mlp_out.1"} <= set(path)
    view = near_sites(found, make_sae(site="resid_post.1|center")).slots
    assert {"resid_post.0|center", "resid_mid.1|center"} <= set(view)
    assert all(name.endswith("|center") for name in view)


def test_both_sites_of_a_transcoder_are_varied():
    found = resolve(model_of("llama"))
    sae = make_sae(site="mlp_in.0", site_out="mlp_out.0")
    [near] = near_sites(found, sae).stages
    assert near == [("mlp_in.1", "mlp_out.1"), ("mlp_in.1", "mlp_out.0"), ("mlp_in.0", "mlp_out.1")]
    [far] = far_sites(found, model_of("llama"), sae).stages
    assert ("mlp_in.2", "mlp_out.2") in far


def test_far_sites_are_in_every_layer():
    model = model_of("llama")
    far = far_sites(resolve(model), model, make_sae(site="mlp_out.0")).slots
    assert {"mlp_out.1", "mlp_out.2", "resid_post.1", "embed"} <= set(far)
