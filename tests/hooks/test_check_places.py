"""The check of attach() tells an SAE's own place from those next to it, which it explains nearly as well."""

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
    """The SAE as if it were built here: nothing is known of what it should do."""
    sae = bundled(name, site)
    copy = type(sae)(type(sae.config).from_dict(sae.config.to_dict())).eval()
    copy.load_state_dict(sae.state_dict())
    return copy


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resid_post.1/gated", "resid_post.0"),  # where FVU is 0.14, and 0.09 was recorded
        ("resid_post.1/standard", "resid_mid.1"),
        ("mlp_out.2/standard", "mlp_out.0"),  # two layers off, where FVU is 0.80, and 0.33 was recorded
        ("mlp_out.2/gated", "mlp_out.0"),
    ],
)
def test_a_place_that_the_sae_explains_a_little_less_well_than_its_own_is_an_error(language_model, name, given):
    sae, right = bundled(name, given), name.split("/")[0]
    with pytest.raises(SiteError, match=f"does not fit {given}: .*At '{right}' FVU is .*did you mean that site"):
        attach(language_model, Splice(sae))
    sae.config.site = right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(language_model, Splice(sae)).checks[0].verdict == "it fits"


def test_a_place_that_is_hardly_worse_is_warned_of_once(language_model):
    sae = unrecorded("resid_post.1/gated", "resid_post.0")
    sae.config.recorded_fvu = 0.094  # and nothing of the norm, which would tell more
    with pytest.warns(UserWarning, match=r"may not belong at resid_post.0: .*At 'resid_post.1' .*Set sae.config.site"):
        attach(language_model, Splice(sae))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [check] = attach(language_model, Splice(sae)).checks
    assert check.verdict == "it seems to belong to resid_post.1"


@pytest.mark.parametrize("given", ["resid_post.0", "resid_mid.1"])
def test_without_a_record_a_place_where_the_sae_explains_much_is_taken(language_model, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach(language_model, Splice(unrecorded("resid_post.1/gated", given))).checks[0].verdict == "it fits"


SHORT_IN_NORM = """<|endoftext|>   take baz.take as the   # baz, baz.take, and the take, take bar as the
   taken bound.bar as foo   # bound, bound.bar, and foo taken, bar and as foo
   bound import.the as take  # import, import.the, and take bound, the import as take
   taken two.three as bar # two, two.three, and bar taken, three take as bar
   """


def test_a_view_of_the_own_place_does_not_suit_better_because_of_its_length(language_model):
    """On this text FVU is 0.31 and the norm 8.4, where 0.18 and 10.3 were recorded; unit_norm brings it near that."""
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


def test_near_places_are_the_layers_beside_and_the_sites_of_the_layer():
    near = near_sites(resolve(model_of("llama")), make_sae(site="resid_post.1"))
    assert set(near.slots) == {
        *("resid_post.0", "resid_post.2"),
        *("resid_pre.1", "attn_in.1", "attn_z.1", "attn_out.1", "resid_mid.1", "mlp_in.1", "mlp_out.1"),
    }
    assert all(pair.read == pair.written for [stage] in [near.stages] for pair in stage)


def test_near_places_of_a_path_and_of_a_view_are_of_their_kind():
    found = resolve(model_of("llama"))
    path = near_sites(found, make_sae(site="model.layers.1.self_attn.output")).slots
    assert {"model.layers.0.self_attn.output", "model.layers.2.self_attn.output", "mlp_out.1"} <= set(path)
    view = near_sites(found, make_sae(site="resid_post.1|center")).slots
    assert {"resid_post.0|center", "resid_mid.1|center"} <= set(view)
    assert all(name.endswith("|center") for name in view)


def test_a_transcoder_is_moved_with_both_of_its_sites():
    found = resolve(model_of("llama"))
    sae = make_sae(site="mlp_in.0", site_out="mlp_out.0")
    [near] = near_sites(found, sae).stages
    assert near == [("mlp_in.1", "mlp_out.1"), ("mlp_in.1", "mlp_out.0"), ("mlp_in.0", "mlp_out.1")]
    [far] = far_sites(found, model_of("llama"), sae).stages
    assert ("mlp_in.2", "mlp_out.2") in far


def test_far_places_are_those_of_every_layer():
    model = model_of("llama")
    far = far_sites(resolve(model), model, make_sae(site="mlp_out.0")).slots
    assert {"mlp_out.1", "mlp_out.2", "resid_post.1", "embed"} <= set(far)
