"""Every dashboard name in the index leads to one SAE."""

from __future__ import annotations

import re

import pytest

from hf_gated_sae.catalog.index_search import search
from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.hub import neuronpedia
from hf_gated_sae.hub.index import Release, known_facts, known_saes
from hf_gated_sae.hub.neuronpedia import sae_of_dashboards

NAMES = {sae.neuronpedia: sae for sae in known_saes() if sae.neuronpedia}

# Ten SAEs have two names in SAELens's registry; one name of the tenth contradicts its folder and is left out.
TWO_NAMES = {
    ("google/gemma-scope-2b-pt-res", "layer_5/width_1m/average_l0_114"): "gemma-2-2b/5-gemmascope-res-1m",
    ("google/gemma-scope-9b-pt-mlp", "layer_0/width_16k/average_l0_50"): "gemma-2-9b/0-gemmascope-mlp-16k",
    ("google/gemma-scope-9b-pt-mlp", "layer_4/width_16k/average_l0_66"): "gemma-2-9b/4-gemmascope-mlp-16k",
    ("google/gemma-scope-9b-pt-mlp", "layer_9/width_16k/average_l0_83"): "gemma-2-9b/9-gemmascope-mlp-16k",
    ("google/gemma-scope-9b-pt-mlp", "layer_23/width_16k/average_l0_73"): "gemma-2-9b/23-gemmascope-mlp-16k",
    ("google/gemma-scope-9b-pt-mlp", "layer_25/width_16k/average_l0_72"): "gemma-2-9b/25-gemmascope-mlp-16k",
    ("google/gemma-scope-9b-pt-res", "layer_1/width_16k/average_l0_69"): "gemma-2-9b/1-gemmascope-res-16k",
    ("google/gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_67"): "gemma-2-9b/2-gemmascope-res-16k",
    ("google/gemma-scope-9b-pt-res", "layer_31/width_16k/average_l0_114"): "gemma-2-9b/31-gemmascope-res-16k",
}
TENTH = "google/gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"


def test_every_name_leads_to_its_sae():
    assert len(NAMES) == 2_441 - 3  # three contradict the SAE to which the registry assigns them
    for model in {name.split("/")[0] for name in NAMES}:
        name, sae = next((name, sae) for name, sae in NAMES.items() if name.startswith(f"{model}/"))
        for text in (name, name.upper(), f"neuronpedia:{name}", f"neuronpedia.org/{name}/7", f"{name}/7"):
            found = sae_of_dashboards(text)
            assert (found.repo, found.address) == (sae.repo, sae.address), text


def test_an_sae_with_two_names_is_found_by_both_and_shows_the_plain_one():
    named: dict[tuple[str, str], set[str]] = {}
    for sae in known_saes():
        if sae.neuronpedia:
            named.setdefault((sae.repo, sae.address), set()).add(sae.neuronpedia)
    assert {place: min(names, key=len) for place, names in named.items() if len(names) > 1} == TWO_NAMES
    shown = {(result.repo, result.subfolder): result.neuronpedia for result in search(live=False)}
    for (repo, address), plain in TWO_NAMES.items():
        for name in named[repo, address]:
            found = sae_of_dashboards(name)
            assert (found.repo, found.address) == (repo, address)
        l0 = re.search(r"\d+$", address)[0]
        assert named[repo, address] == {plain, f"{plain}__l0-{l0}"}
        assert known_facts(repo, address)["neuronpedia"] == shown[repo, address] == plain


def test_a_name_that_contradicts_the_folder_is_left_out():
    assert known_facts(*TENTH)["neuronpedia"] == "gemma-2-9b/20-gemmascope-res-131k"
    for wrong in (
        "gemma-2-9b/20-gemmascope-res-131k__l0-12",  # its SAE's folder says 114
        "gemma-2-9b/20-gemmascope-res-131k__l0-10",  # its SAE is of layer 2, width 16k
        "pythia-70m-deduped/e-att-sm",  # its SAE is of the residual stream
    ):
        assert wrong not in NAMES and sae_of_dashboards(wrong) is None
    assert sae_of_dashboards("gpt2-small/12-res-jb").site == "resid_post.11"  # the same site as resid_pre.12


def test_no_name_contradicts_the_layer_width_or_l0_of_its_sae():
    compared = widths = 0
    for name, sae in NAMES.items():
        if l0 := re.search(r"__l0-(\d+)$", name):
            assert float(l0[1]) == sae.l0, sae
        if (width := re.search(r"-(\d+)(k|m)(?:__|$)", name)) and sae.d_sae is not None:
            widths += 1
            assert sae.d_sae // {"k": 1000, "m": 1_000_000}[width[2]] == pytest.approx(int(width[1]), rel=0.05), sae
        if (layer := re.match(r"[^/]+/(\d+)-", name)) and name != "gpt2-small/12-res-jb":
            compared += 1
            assert int(layer[1]) == sae.layer, sae
    assert compared == len(NAMES) - 1 and widths > 1000


@pytest.mark.parametrize(
    "text", ["acme/my-sae", "gemma-2-2b", "gemma-2-2b/layer_3", "a/b/c/d", "", "./x/y", "x/y/1/2"]
)
def test_other_names_are_not_dashboard_names(text):
    assert sae_of_dashboards(text) is None


@pytest.mark.parametrize(
    "text", ["neuronpedia:", "neuronpedia:gemma-2-2b", "https://neuronpedia.org/a/b/c/d", "neuronpedia:a//1"]
)
def test_a_malformed_name_is_an_error_that_shows_the_right_form(text):
    with pytest.raises(InputError, match="expected neuronpedia:MODEL/SAE, such as"):
        sae_of_dashboards(text)


def test_unknown_models_and_names_get_close_matches():
    with pytest.raises(UnknownNameError, match="model of Neuronpedia 'gemma-2-2c'. Did you mean 'gemma-2-2b'"):
        sae_of_dashboards("neuronpedia:gemma-2-2c/12-gemmascope-res-16k")
    with pytest.raises(
        UnknownNameError, match=r"Did you mean 'gemma-2-2b/12-gemmascope-res-16k'.*search\('google/gemm"
    ):
        sae_of_dashboards("neuronpedia:gemma-2-2b/12-gemmascope-res-17k")


def test_an_ambiguous_name_is_refused(monkeypatch):
    group = {"id": "{n}", "axes": ["n"], "values": "1,2", "neuronpedia": "lm/0-twice"}
    made = {"r": Release("r", {"repo": "acme/saes", "groups": [group]})}
    monkeypatch.setattr(neuronpedia, "releases", lambda: made)
    with pytest.raises(InputError, match="several SAEs.*'acme/saes', '1'; 'acme/saes', '2'"):
        sae_of_dashboards("lm/0-twice")
