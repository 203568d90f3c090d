"""The grammar of site names."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import Site
from hf_gated_sae.sites.site import GLOBAL, LAYERED, PORTS
from hf_gated_sae.sites.transforms import TRANSFORMS, Transform

part = st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True)
semantic = st.one_of(
    st.sampled_from(GLOBAL), st.builds("{}.{}".format, st.sampled_from(LAYERED), st.integers(0, 10**6))
)
module_path = st.builds(
    lambda parts, port: ".".join((*parts, port)), st.lists(part, min_size=1, max_size=6), st.sampled_from(PORTS)
)
numbered = st.builds("{}#{}".format, module_path, st.integers(0, 10**6))
positive = st.floats(1e-30, 1e30)
transform = st.one_of(
    st.sampled_from([name for name, kind in TRANSFORMS.items() if kind.default is not None]),
    st.builds(lambda sign, c: str(Transform("scale", sign * c)), st.sampled_from((-1, 1)), positive),
    st.builds(lambda eps: str(Transform("rms_norm", eps)), positive),
)
transformed = st.builds(
    lambda place, more: "|".join((place, *more)), st.one_of(semantic, module_path, numbered), st.lists(transform)
)


@given(st.one_of(semantic, module_path, numbered, transformed))
def test_round_trip(text):
    site = Site.parse(text)
    assert str(site) == text
    assert Site.parse(site) is site
    assert Site.parse(str(site)) == site
    assert hash(Site.parse(text)) == hash(site)
    assert pickle.loads(pickle.dumps(site)) == site


@given(st.one_of(st.text(max_size=30), st.from_regex(r"[a-z_.|#=0-9+-]{1,30}", fullmatch=True)))
def test_any_text_is_a_site_or_a_site_error(text):
    try:
        site = Site.parse(text)
    except SiteError:
        return
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("resid_pots.12", "Did you mean 'resid_post'"),
        ("resid_post", "needs a layer number, such as 'resid_post.0'"),
        ("embed.3", "takes no layer"),
        ("resid_post.-1", "not a layer number"),
        ("resid_post.last", "not a layer number"),
        ("final_nrom", "Did you mean 'final_norm'"),
        ("model.layers.3.outptu", "Did you mean 'output'"),
        ("model.layers.3", "ends in '.input' or '.output'"),
        ("model..norm.output", "is not a site"),
        (".output", "is not a site"),
        ("", "is not a site"),
        ("blocks.3.hook_resid_post", "is not a site: it is TransformerLens's name of 'resid_post.3'"),
        ("layers_output[3]", "nnterp's name of 'resid_post.3'"),
        ("layers.3", "sparsify's name of 'resid_post.3'"),
        ("model.norm.output#", "is not a tensor index"),
        ("model.norm.output#-1", "is not a tensor index"),
        ("resid_post.3#1", "is not a layer number"),
        ("model.norm#1.output", "is not a site"),
        ("resid_post.3|centre", "Did you mean 'center'"),
        ("resid_post.3|", "Unknown transform ''"),
        ("resid_post.3|center=2", "takes no value"),
        ("resid_post.3|scale", "needs a factor"),
        ("resid_post.3|scale=0", "cannot be undone"),
        ("resid_post.3|scale=1e999", "cannot be undone"),
        ("resid_post.3|scale=1e-320", "cannot be undone"),
        ("resid_post.3|scale=nan", "is not a number"),
        ("resid_post.3|scale=1_0", "is not a number"),
        ("resid_post.3|rms_norm=-1", "must be positive"),
        ("resid_post.3|scale=1e-40", "in float32"),
        ("resid_post.3|scale=-1e38", "in float32"),
        ("resid_post.3|center|", "there is no name after '|'"),
        ("residpost.1", "With its layer: 'resid_post.1'"),
        ("resid_post.1.5", "Did you mean 'resid_post.1'?"),
        ("resid_post." + "9" * 5000, "is not a layer number"),
    ],
)
def test_bad_names_say_what_to_write(text, hint):
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    assert hint in str(caught.value)


def test_not_a_string():
    with pytest.raises(SiteError, match="named by a string"):
        Site.parse(12)


def test_constructor_keeps_the_grammar():
    with pytest.raises(SiteError, match="Not a site"):
        Site("resid_post")
    with pytest.raises(SiteError, match="Not a site"):
        Site("embed", layer=1)
    with pytest.raises(SiteError, match="layer=True"):
        Site("resid_post", True)
    with pytest.raises(SiteError, match="index=True"):
        Site("model.norm", port="output", index=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Site("embed").name = "final_norm"


def test_numbers_have_one_spelling():
    for text in ("resid_post.3|scale=2", "resid_post.03|scale=2.0", "resid_post.3|scale=+.2e1"):
        assert str(Site.parse(text)) == "resid_post.3|scale=2"
        assert Site.parse(text) == Site("resid_post", 3, transforms=(Transform("scale", 2),))


def test_the_bare_site():
    site = Site.parse("model.norm.output#1|center|scale=2")
    assert site.index == 1
    assert str(site.bare) == "model.norm.output#1"
    assert site.bare.transformed(*site.transforms) == site
    assert site.bare.bare == site.bare
    with pytest.raises(SiteError, match="expected a tuple of Transform"):
        Site("embed", transforms=("center",))
    with pytest.raises(SiteError, match="index=1"):
        Site("embed", index=1)


def test_paths_are_distinguished_from_semantic_names():
    assert Site.parse("final_norm.output").is_path
    assert Site.parse("embed.output") == Site("embed", port="output")
    assert not Site.parse("final_norm").is_path
