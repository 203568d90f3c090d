"""Search over the index and over the loopback Hub."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

import hf_gated_sae
from hf_gated_sae import SAEModel
from hf_gated_sae.catalog.index_search import SearchResult, search
from hf_gated_sae.cli import info as _info  # noqa: F401  # makes the subcommand known
from hf_gated_sae.cli.app import app
from hf_gated_sae.errors import InputError, MissingFileError, UnknownNameError
from hf_gated_sae.formats.gemma_scope import GemmaScopeFormat
from hf_gated_sae.publishing import CardFacts, push_to_hub
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub

GEMMA = "google/gemma-2-2b"


def test_search_is_exported():
    assert hf_gated_sae.search is search


def test_results_are_facts():
    found, _ = search(GEMMA, site="resid_post.12", width="32k", near_l0=80, live=False)
    assert found == SearchResult(
        repo="google/gemma-scope-2b-pt-res",
        subfolder="layer_12/width_32k/average_l0_76",
        base_model=GEMMA,
        site="resid_post.12",
        layer=12,
        d_sae=32768,
        architecture="jumprelu",
        l0=76,
        l0_kind="measured",
        neuronpedia="gemma-2-2b/12-gemmascope-res-32k",
        release="gemma-scope-2b-pt-res",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.repo = "x"


def test_every_sae_once():
    found = search(live=False)
    assert len({(result.repo, result.subfolder) for result in found}) == len(found)
    assert len(found) == 13_857 - 429  # ids of canonical releases refer to SAEs that other releases list


@pytest.mark.parametrize("name", ["gemma-2-2b", "Google/Gemma-2-2B"])
def test_a_base_model_has_several_spellings(name):
    assert search(name, live=False) == search(GEMMA, live=False) != []


@pytest.mark.parametrize("width", ["16k", "16384", 16384, "16K"])
def test_filters(width):
    found = search(GEMMA, site="mlp_out", layer=3, width=width, architecture="jumprelu", live=False)
    assert len(found) == 5
    assert {result.site for result in found} == {"mlp_out.3"} and {result.d_sae for result in found} == {16384}
    assert [result.l0 for result in found] == sorted(result.l0 for result in found)


def test_the_nearest_l0_of_each_kind():
    every = search(GEMMA, layer=12, live=False)
    found = search(GEMMA, layer=12, near_l0=80, live=False)
    assert len({(result.repo, result.site, result.d_sae) for result in found}) == len(found) == 14
    for result in found:
        alike = [o for o in every if (o.repo, o.site, o.d_sae) == (result.repo, result.site, result.d_sae)]
        assert abs(result.l0 - 80) == min(abs(other.l0 - 80) for other in alike)
    # This publisher's repositories differ only in their L0.
    assert [one.l0 for one in search("Qwen/Qwen3-8B-Base", layer=3, near_l0=90, live=False)] == [100]


def test_near_l0_compares_targets_of_gemma_scope_2():
    found = search("google/gemma-3-4b-pt", layer=17, near_l0=60, live=False)
    assert {(result.l0, result.l0_kind) for result in found} == {(60, "target")} and len(found) == 13
    assert all("_l0_medium" in result.subfolder for result in found)
    [small] = search("google/gemma-3-4b-pt", site="resid_post.17", width="16k", near_l0=30, live=False)
    assert small.l0 == 20  # the targets are 20, 60, 120 and 150


def test_releases_and_dashboard_names_find_their_saes(hub: MiniHub):
    canonical = search("gemma-scope-2b-pt-res-canonical")
    assert len(canonical) == 58 and {result.release for result in canonical} == {"gemma-scope-2b-pt-res-canonical"}
    for name in ("gemma-2-2b/12-gemmascope-res-16k", "neuronpedia:gemma-2-2b/12-gemmascope-res-16k"):
        [found] = search(name)
        assert found.subfolder == "layer_12/width_16k/average_l0_82"
    assert search("gemma-2-2b/12-gemmascope-res-16k", layer=3) == []
    assert hub.requests == []


def test_the_residual_stream_is_first_and_training_checkpoints_are_last():
    found = search(GEMMA, layer=12, live=False)
    assert found[0].site == "resid_post.12" and found[0].l0 is not None
    halfway = ["_step_" in result.subfolder for result in found]
    assert halfway == sorted(halfway) and halfway[-1]
    assert len([result for result in found if result.site_out]) == 2  # a transcoder, and a layer of a cross-layer one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_model": "google/gemma-2-2"}, "Did you mean 'google/gemma-2-2b'"),
        ({"base_model": "gemma-2-2b/12-gemmascope-res-17k"}, "Did you mean 'gemma-2-2b/12-gemmascope-res-16k'"),
        ({"site": "resid_pots"}, "Did you mean 'resid_post'"),
        ({"architecture": "gatd"}, "Did you mean 'gated'"),
    ],
)
def test_unknown_names_get_close_matches(wrong, message):
    with pytest.raises(UnknownNameError, match=message):
        search(**wrong, live=False)


def test_a_wrong_width_is_an_error_and_an_absent_one_is_not():
    with pytest.raises(InputError, match="16k"):
        search(GEMMA, width="wide", live=False)
    assert search(GEMMA, width=12345, live=False) == search(GEMMA, layer=99, live=False) == []
    assert search(GEMMA, site="model.layers.3.mlp.output", live=False) == []


@pytest.mark.parametrize("wrong", ["12", -1, 1.5, True])
def test_a_layer_is_a_whole_number(wrong):
    with pytest.raises(InputError, match="layer is .*expected the number of a block"):
        search(GEMMA, layer=wrong, live=False)


@pytest.mark.parametrize("wrong", ["60", -1, float("nan"), float("inf"), True])
def test_an_l0_is_a_number(wrong):
    with pytest.raises(InputError, match="near_l0 is .*expected a mean number of active latents"):
        search(GEMMA, near_l0=wrong, live=False)


def test_code():
    assert SearchResult("a/b").code == 'SAEModel.from_pretrained("a/b")'
    assert SearchResult("a/b", 'x")\nprint("').code == r'SAEModel.from_pretrained("a/b", "x\")\nprint(\"")'
    assert SearchResult("a/b", "c/d", "main").code == 'SAEModel.from_pretrained("a/b", "c/d", revision="main")'


def test_without_live_no_request_is_made(hub: MiniHub):
    search(GEMMA, live=False)
    assert hub.requests == []


def test_published_saes_are_found_and_load(hub: MiniHub, repo_id: str, cache_dir: str):
    """One repository with one SAE, one with a table of contents; both name a base model that is not in the index."""
    model = f"{repo_id}-lm"
    first = example("gated", site="resid_post.2", base_model=model)
    push_to_hub(first, f"{repo_id}-one", facts=CardFacts(metrics={"l0": 12.5}))
    push_to_hub(example("topk", site="mlp_out.1", base_model=model), f"{repo_id}-two", subfolder="a")
    push_to_hub(example("gated", site="resid_post.1", base_model=model), f"{repo_id}-two", subfolder="b",
                facts=CardFacts(metrics={"l0": 3.0}))  # fmt: skip
    found = search(model)
    assert [(result.repo, result.subfolder, result.site, result.architecture) for result in found] == [
        (f"{repo_id}-two", "b", "resid_post.1", "gated"),
        (f"{repo_id}-one", "", "resid_post.2", "gated"),
        (f"{repo_id}-two", "a", "mlp_out.1", "topk"),
    ]
    assert {result.base_model for result in found} == {model} and {result.release for result in found} == {None}
    assert [result.l0 for result in found] == [3.0, None, None]
    assert {result.d_sae for result in found} == {first.config.d_sae}
    [one] = search(model, site="resid_post", layer=2, width=first.config.d_sae, architecture="gated")
    assert_same(first, one.load(cache_dir=cache_dir))
    with pytest.raises(UnknownNameError, match="base model"):
        search(model, live=False)


def tagged(hub: MiniHub, repo_id: str, files: dict[str, bytes], base_model: str) -> None:
    card = f"---\ntags: [sparse-autoencoder]\nbase_model: {base_model}\n---\n"
    api = HfApi()
    api.create_repo(repo_id)
    for name, content in {**files, "README.md": card.encode()}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)


def test_foreign_layouts_are_found_by_their_names(hub: MiniHub, repo_id: str, tmp_path):
    written = GemmaScopeFormat().examples(tmp_path)[0]
    content = (tmp_path / written.repo / written.address / "params.npz").read_bytes()
    tagged(hub, repo_id, {f"{written.address}/params.npz": content}, f"{repo_id}-lm")
    [found] = search(f"{repo_id}-lm", layer=1)
    assert (found.repo, found.subfolder, found.site, found.base_model) == (
        repo_id, written.address, None, f"{repo_id}-lm"
    )  # fmt: skip
    assert not [r for r in hub.requests if r[0] == "GET" and "params.npz" in r[1]]


@pytest.mark.parametrize(
    "contents",
    [
        "no json",
        json.dumps([]),
        json.dumps({"saes": 3}),
        json.dumps({"saes": {"a": 1, "b": {"site": 7, "d_sae": "x"}}}),
    ],
)
def test_a_broken_table_of_contents_does_not_break_the_search(hub: MiniHub, repo_id: str, contents: str):
    repo = f"{repo_id[:60].rstrip('-_')}-{len(contents)}"
    tagged(hub, repo, {"sae_set.json": contents.encode()}, GEMMA)
    found = search(GEMMA)
    assert {result.repo for result in found} - {repo} and len(found) >= len(search(GEMMA, live=False))
    HfApi().delete_repo(repo)


def test_repositories_of_the_index_are_not_listed_twice(hub: MiniHub):
    assert len(search(GEMMA, layer=12, site="resid_post")) == len(
        search(GEMMA, layer=12, site="resid_post", live=False)
    )


def test_offline_only_the_index_is_searched(hub: MiniHub, monkeypatch):
    monkeypatch.setattr("hf_gated_sae.catalog.hub_listing.is_offline_mode", lambda: True)
    assert search(GEMMA, layer=12) == search(GEMMA, layer=12, live=False)
    assert hub.requests == []


def test_without_a_network_only_the_index_is_searched_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("hf_gated_sae.catalog.hub_listing.HfApi", lambda token: HfApi(endpoint="http://127.0.0.1:9"))
    with caplog.at_level(logging.WARNING):
        assert search(GEMMA, layer=12) == search(GEMMA, layer=12, live=False)
    assert "only SAEs of the index are shown" in caplog.text


@pytest.fixture
def gemma_scope(hub: MiniHub, tmp_path):
    """A repository of the index, on the loopback Hub, with two of its SAEs."""
    hub.add_user("google", "hf_google")
    repo, api = "google/gemma-scope-2b-pt-res", HfApi(token="hf_google")
    hub.repos.pop(("models", repo), None)  # another test may have made one of this name
    written = GemmaScopeFormat().examples(tmp_path)[0]
    params = tmp_path / written.repo / written.address / "params.npz"
    api.create_repo(repo)
    for address in ("layer_12/width_16k/average_l0_82", "layer_12/width_16k/average_l0_7"):
        api.upload_file(path_or_fileobj=params, path_in_repo=f"{address}/params.npz", repo_id=repo)
    yield repo
    api.delete_repo(repo)


def test_an_alias_loads_its_sae(gemma_scope: str, cache_dir: str):
    sae = SAEModel.from_pretrained(
        "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", cache_dir=cache_dir
    )
    assert (sae.checkpoint.repo, sae.checkpoint.subfolder) == (gemma_scope, "layer_12/width_16k/average_l0_82")
    assert sae.config.site == "resid_post.12"
    again = SAEModel.from_pretrained(gemma_scope, "layer_12/width_16k/canonical", cache_dir=cache_dir)
    pinned = SAEModel.from_pretrained(
        f"gemma-scope-2b-pt-res@{sae.checkpoint.revision}", "layer_12/width_16k/average_l0_82", cache_dir=cache_dir
    )
    assert again.checkpoint == sae.checkpoint and pinned.checkpoint.revision == sae.checkpoint.revision


NAMES = [
    "gemma-2-2b/12-gemmascope-res-16k",
    "neuronpedia:gemma-2-2b/12-gemmascope-res-16k",
    "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/1234?embed=true",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_name_loads_its_sae(gemma_scope: str, cache_dir: str, name: str):
    sae = SAEModel.from_pretrained(name, cache_dir=cache_dir)
    assert (sae.checkpoint.repo, sae.checkpoint.subfolder) == (gemma_scope, "layer_12/width_16k/average_l0_82")
    pinned = SAEModel.from_pretrained(f"{name}@{sae.checkpoint.revision}", cache_dir=cache_dir)
    assert pinned.checkpoint == sae.checkpoint


@pytest.mark.parametrize("name", [*NAMES, "gemma-scope-2b-pt-res-canonical layer_12/width_16k/canonical"])
def test_info_of_a_dashboard_name_and_of_a_release(gemma_scope: str, name: str):
    done = CliRunner().invoke(app, ["info", *name.split()], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert f"repository {gemma_scope}" in said and "address layer_12/width_16k/average_l0_82" in said
    assert "L0 82 (measured)" in said and "neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k" in said


def test_an_sae_that_is_not_in_the_index_loads(gemma_scope: str, cache_dir: str):
    sae = SAEModel.from_pretrained(gemma_scope, "layer_12/width_16k/average_l0_7", cache_dir=cache_dir)
    assert sae.config.site == "resid_post.12"


def test_a_local_folder_of_that_name_wins(tmp_path, monkeypatch):
    example().save_pretrained(tmp_path / "gemma-scope-2b-pt-res" / "a")
    monkeypatch.chdir(tmp_path)
    assert_same(example(), SAEModel.from_pretrained("gemma-scope-2b-pt-res", "a"))


def test_saelens_arguments_are_understood(gemma_scope: str, cache_dir: str):
    given = {"release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_12/width_16k/canonical"}
    sae = SAEModel.from_pretrained(**given, cache_dir=cache_dir)
    assert (sae.checkpoint.repo, sae.checkpoint.subfolder) == (gemma_scope, "layer_12/width_16k/average_l0_82")
    again = SAEModel.from_pretrained(given["release"], sae_id=given["sae_id"], cache_dir=cache_dir)
    assert again.checkpoint == sae.checkpoint


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ({"release": "a", "pretrained_model_name_or_path": "b"}, "release='a' and 'b' for the same argument"),
        ({"sae_id": "a", "subfolder": "b", "release": "c"}, "sae_id='a' and 'b'"),
        ({"sae_id": "a"}, "sae_id='a' without release=; pass the release="),
        ({}, "neither a checkpoint nor config="),
    ],
)
def test_contradicting_or_missing_arguments_are_refused(given, phrase):
    with pytest.raises(InputError, match=phrase):
        SAEModel.from_pretrained(**given)


def test_a_misspelt_dashboard_name_gets_close_matches(hub: MiniHub, cache_dir: str):
    hub.requests.clear()
    with pytest.raises(UnknownNameError, match="Did you mean 'gemma-2-2b/12-gemmascope-res-16k'"):
        SAEModel.from_pretrained("neuronpedia:gemma-2-2b/12-gemmascope-res-17k", cache_dir=cache_dir)
    assert hub.requests == []
    # Without the prefix it may be a repository, which the Hub does not have.
    with pytest.raises(MissingFileError, match="Did you mean 'gemma-2-2b/12-gemmascope-res-16k'"):
        SAEModel.from_pretrained("gemma-2-2b/12-gemmascope-res-17k", cache_dir=cache_dir)


def test_a_dashboard_name_and_a_subfolder_contradict_each_other(hub: MiniHub, cache_dir: str):
    with pytest.raises(InputError, match="subfolder 'layer_3': omit the subfolder"):
        SAEModel.from_pretrained("gemma-2-2b/12-gemmascope-res-16k", "layer_3", cache_dir=cache_dir)


def test_a_misspelt_release_gets_close_matches(hub: MiniHub, cache_dir: str):
    with pytest.raises(MissingFileError, match="Did you mean 'gemma-scope-2b-pt-res'"):
        SAEModel.from_pretrained("gemma-scope-2b-pt-ress", "layer_12/width_16k/average_l0_7", cache_dir=cache_dir)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer_12/width_16k/canonical'"):
        SAEModel.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonica", cache_dir=cache_dir)
