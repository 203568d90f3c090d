"""Several SAEs of one repository."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from hf_gated_sae import SAEModel, SAESet, Splice, attach, capture
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, UnknownNameError
from hf_gated_sae.publishing import push_to_hub
from tests.support.example_saes import assert_same, example
from tests.support.foreign import seed_gemma_scope
from tests.support.mini_hub import MiniHub
from tests.support.tiny_models import tiny_model

WEIGHTS = (".npz", ".safetensors")


@pytest.fixture
def scope(hub: MiniHub, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A repository named like one of Gemma Scope's, with 12 layers and two SAEs at each."""
    repo_id = f"acme{abs(hash(request.node.name))}/gemma-scope-2b-pt-res"
    seed_gemma_scope(hub, repo_id, tmp_path / "theirs", layers=12)
    hub.requests.clear()
    return repo_id


def downloads(hub: MiniHub) -> list[str]:
    """Return the requests for whole tensor files."""
    return [
        path for method, path, _, span, _ in hub.requests
        if method == "GET" and path.split("?")[0].endswith(WEIGHTS) and span is None and path.startswith("/cdn")
    ]  # fmt: skip


def listings(hub: MiniHub, repo_id: str) -> int:
    return sum(f"/api/models/{repo_id}/revision/" in path for _, path, *_ in hub.requests)


def local_set(root: Path) -> None:
    """Write two SAEs at one site, one at another, and one without a site."""
    for place, architecture, site in (
        ("resid_post.1/gated", "gated", "resid_post.1"),
        ("resid_post.1/topk", "topk", "resid_post.1"),
        ("mlp_out.0", "standard", "mlp_out.0"),
        ("nameless", "standard", None),
    ):
        example(architecture, site=site).save_pretrained(root / place)


def test_a_set_is_one_commit_one_listing_and_no_weights(hub: MiniHub, scope: str, cache_dir: str) -> None:
    commit = hub.repo(scope).at("main").id
    found = SAESet.from_pretrained(scope, cache_dir=cache_dir)
    assert len(found) == 25 and found.revision == commit and scope in repr(found)
    assert listings(hub, scope) <= 2 and not downloads(hub)
    hub.seed(scope, {"layer_1/width_16k/average_l0_71/params.npz": b"somebody breaks it afterwards"})
    sae = found["layer_1/width_16k/average_l0_71"]
    assert sae.checkpoint.revision == commit and sae.config.site == "resid_post.1"
    assert len(downloads(hub)) == 1
    assert listings(hub, scope) <= 2


def test_addresses_are_in_natural_order(scope: str, cache_dir: str) -> None:
    found = SAESet.from_pretrained(scope, cache_dir=cache_dir, addresses="layer_*/*/*_71")
    assert list(found) == [f"layer_{layer}/width_16k/average_l0_71" for layer in range(12)] == found.addresses
    assert found.sites == [f"resid_post.{layer}" for layer in range(12)]


def test_by_site(hub: MiniHub, scope: str, cache_dir: str) -> None:
    found = SAESet.from_pretrained(scope, cache_dir=cache_dir, addresses=["layer_*/*/*_71", "embedding/*"])
    assert found["resid_post.11"].checkpoint.subfolder == "layer_11/width_16k/average_l0_71"
    assert found["embed"].config.d_in == 9
    assert "resid_post.3" in found and "layer_3/width_16k/average_l0_71" in found
    assert "resid_post.12" not in found and 3 not in found
    assert found.get("resid_post.12") is None


@pytest.mark.parametrize(
    "sites, expected",
    [("resid_post.3", 2), (["resid_post.3", "embed"], 3), ("resid_post.1*", 6), (("embed", "resid_post.?"), 21)],
)
def test_sites_filter(scope: str, cache_dir: str, hub: MiniHub, sites: str, expected: int) -> None:
    found = SAESet.from_pretrained(scope, sites=sites, cache_dir=cache_dir)
    assert len(found) == expected
    assert not downloads(hub)
    before = len(hub.requests)
    assert found.sites and all(found.describe(address).config.site in found.sites for address in found)
    assert len(hub.requests) == before, "what the filter read is not requested again"


def test_a_folder_is_not_an_sae(scope: str, cache_dir: str) -> None:
    found = SAESet.from_pretrained(scope, cache_dir=cache_dir)
    with pytest.raises(
        UnknownNameError, match="Known: layer_3/width_16k/average_l0_12, layer_3/width_16k/average_l0_71."
    ):
        found["layer_3"]


def test_a_description_costs_headers(hub: MiniHub, scope: str, cache_dir: str) -> None:
    found = SAESet.from_pretrained(scope, "layer_3", cache_dir=cache_dir)
    assert found.addresses == [f"layer_3/width_16k/average_l0_{l0}" for l0 in (12, 71)]
    described = found.describe("layer_3/width_16k/average_l0_71")
    assert (described.config.site, described.config.d_sae) == ("resid_post.3", 16)
    assert described.stored["W_dec"].shape == (16, 6)
    assert not downloads(hub)


def test_an_sae_is_one_object_while_it_is_referenced(tmp_path: Path) -> None:
    local_set(tmp_path)
    found = SAESet.from_pretrained(tmp_path)
    sae = found["mlp_out.0"]
    assert found["mlp_out.0"] is sae
    assert_same(sae, SAEModel.from_pretrained(tmp_path, "mlp_out.0"))
    reference = id(sae.config)
    sae.config.recorded_tokens = 7
    assert found.describe("mlp_out.0").config.recorded_tokens == 0 and id(found.describe("mlp_out.0")) != reference
    del sae
    gc.collect()
    assert not found._loaded, "a loop over a large set needs the memory of one SAE"
    assert [type(sae).__name__ for sae in found.values()] == ["StandardSAE", "StandardSAE", "GatedSAE", "TopKSAE"]
    assert found != SAESet.from_pretrained(tmp_path) and len({found, found}) == 1


def test_options_reach_every_sae(tmp_path: Path) -> None:
    local_set(tmp_path)
    found = SAESet.from_pretrained(tmp_path, dtype=torch.float16, latents=[3, 1], addresses="mlp_out.0")
    assert found["mlp_out.0"].dtype == torch.float16 and found["mlp_out.0"].config.kept_latents == [3, 1]
    other = found.load("mlp_out.0", dtype=torch.float32, latents=None)
    assert other.dtype == torch.float32 and other.config.kept_latents is None


def test_a_site_with_several_saes_is_ambiguous(tmp_path: Path) -> None:
    local_set(tmp_path)
    found = SAESet.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="2 SAEs .* 'resid_post.1': 'resid_post.1/gated', 'resid_post.1/topk'"):
        found["resid_post.1"]
    assert "resid_post.1" in found and found.sites == ["mlp_out.0", "resid_post.1"]
    narrowed = SAESet.from_pretrained(tmp_path, addresses="*/gated")
    assert type(narrowed["resid_post.1"]).__name__ == "GatedSAE"
    assert SAESet.from_pretrained(tmp_path, "resid_post.1").addresses == ["resid_post.1/gated", "resid_post.1/topk"]


@pytest.mark.parametrize(
    "key, phrase",
    [
        ("resid_post.2", "Did you mean 'resid_post.1'"),
        ("resid_post.1/gatd", "Did you mean 'resid_post.1/gated'"),
        ("resid_post", "Did you mean 'resid_post.1'"),
        ("xyz", "Known: mlp_out.0, nameless, resid_post.1"),
    ],
)
def test_an_unknown_name(tmp_path: Path, key: str, phrase: str) -> None:
    local_set(tmp_path)
    found = SAESet.from_pretrained(tmp_path)
    for error in (UnknownNameError, KeyError, ValueError):
        with pytest.raises(error, match=phrase) as caught:
            found[key]
        assert not str(caught.value).startswith(("'", '"'))


@pytest.mark.parametrize(
    "options, phrase",
    [
        ({"sites": "resid_pst.1"}, "Unknown site .*Did you mean 'resid_post.1'"),
        ({"sites": ["mlp_out.0", "attn*"]}, r"Unknown site 'attn\*'"),
        ({"addresses": "mlp_out.1"}, "Unknown address .*Did you mean 'mlp_out.0'"),
        ({"site": "resid_post.1"}, "no argument 'site'. Did you mean 'sites'"),
        ({"base_model": "acme/lm"}, "no argument 'base_model'"),
        ({"config": None}, "no argument 'config'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, object], phrase: str) -> None:
    """Includes keys of the configuration: one value for all SAEs would be wrong for most."""
    local_set(tmp_path)
    with pytest.raises(InputError, match=phrase):
        SAESet.from_pretrained(tmp_path, **options)


def test_nothing_there(tmp_path: Path, hub: MiniHub, repo_id: str) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(CheckpointError, match="no SAE in a known format"):
        SAESet.from_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match="no folder 'layer_1'"):
        SAESet.from_pretrained(tmp_path, "layer_1")
    with pytest.raises(MissingFileError, match="neither a folder"):
        SAESet.from_pretrained(repo_id)


def test_a_broken_member_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    local_set(tmp_path)
    (tmp_path / "nameless" / "config.json").write_text("{}")
    found = SAESet.from_pretrained(tmp_path, sites="mlp_out.0")  # the others load
    assert len(found) == 1
    assert "nameless" in caplog.text and "addresses=" in caplog.text
    whole = SAESet.from_pretrained(tmp_path)
    assert "mlp_out.0" in whole.sites and len(whole) == 4
    for key in ("nameless", "resid_post.77"):  # the broken SAE may be the requested one
        with pytest.raises(CheckpointError, match="nameless.*addresses="):
            whole[key]
    with pytest.raises(CheckpointError, match="nameless.*addresses="):
        SAESet.from_pretrained(tmp_path, sites="resid_post.77")
    with pytest.raises(CheckpointError, match="nameless.*addresses="):
        SAESet.from_pretrained(tmp_path, addresses="nameless", sites="mlp_out.0")
    assert len(SAESet.from_pretrained(tmp_path, addresses="[mr]*", sites="mlp_out.0")) == 1
    assert len(SAESet.from_pretrained(tmp_path)) == 4


def test_a_set_of_one(tmp_path: Path) -> None:
    example(site="resid_post.0").save_pretrained(tmp_path)
    found = SAESet.from_pretrained(tmp_path)
    assert found.addresses == [""] and found[""] is found["resid_post.0"]


def test_a_set_that_we_published(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    saes = {site: example(site=site) for site in ("resid_post.10", "resid_post.2")}
    for site, sae in saes.items():
        push_to_hub(sae, repo_id, subfolder=site)
    found = SAESet.from_pretrained(repo_id, cache_dir=cache_dir)
    assert list(found) == ["resid_post.2", "resid_post.10"]
    for site, sae in found.items():
        assert_same(sae, saes[site])


def test_in_a_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    width = model.config.hidden_size
    for layer in (0, 1):
        example(d_in=width, site=f"resid_post.{layer}").save_pretrained(tmp_path / f"layer_{layer}")
    saes = SAESet.from_pretrained(tmp_path, sites="resid_post.*")
    ids = torch.tensor([[1, 2, 3]])
    with attach(model, *(Splice(sae) for sae in saes.values())):
        model(input_ids=ids)
    assert len(capture(model, list(saes.values()), input_ids=ids)) == 2
