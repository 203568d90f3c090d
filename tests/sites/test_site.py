"""The grammar of site names."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.errors import SiteError
from hf_gated_sae.sites import Site
from hf_gated_sae.sites.site import GLOBAL, LAYERED, PORTS

part = st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True)
semantic = st.one_of(
    st.sampled_from(GLOBAL), st.builds("{}.{}".format, st.sampled_from(LAYERED), st.integers(0, 10**6))
)
module_path = st.builds(
    lambda parts, port: ".".join((*parts, port)), st.lists(part, min_size=1, max_size=6), st.sampled_from(PORTS)
)


@given(st.one_of(semantic, module_path))
def test_round_trip(text):
    site = Site.parse(text)
    assert str(site) == text
    assert Site.parse(site) is site
    assert Site.parse(str(site)) == site
    assert hash(Site.parse(text)) == hash(site)
    assert pickle.loads(pickle.dumps(site)) == site


@given(st.text(max_size=30))
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
        ("blocks.3.hook_resid_post", "is not a site"),
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        Site("embed").name = "final_norm"


def test_paths_are_told_from_semantic_names():
    assert Site.parse("final_norm.output").is_path
    assert Site.parse("embed.output") == Site("embed", port="output")
    assert not Site.parse("final_norm").is_path
