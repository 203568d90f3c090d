"""Whatever goes wrong while fetching, an SAE is loaded correctly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, MissingFileError, SAEError
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub

LATENTS = [11, 2, 5]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the client's waits between retries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def published(hub: MiniHub, repo_id: str) -> str:
    """A repository with an SAE whose rows are far enough apart to be requested separately."""
    example("gated", site="resid_post.1", d_in=1500).push_to_hub(repo_id)
    hub.requests.clear()
    return repo_id


def sound() -> SAEModel:
    return example("gated", site="resid_post.1", d_in=1500)


def assert_slice(some: SAEModel, full: SAEModel, latents: list[int] = LATENTS) -> None:
    assert some.config.kept_latents == latents
    for name, tensor in some.state_dict().items():
        whole = full.state_dict()[name]
        assert torch.equal(tensor, whole if name == "b_dec" else whole[latents]), name


def load(repo: str, cache_dir: str, partial: bool) -> SAEModel:
    return SAEModel.from_pretrained(repo, cache_dir=cache_dir, **({"latents": LATENTS} if partial else {}))


both = pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])

PASSING: dict[str, tuple[str, dict[str, Any]]] = {
    "too many requests": ("status", {"status": 429, "headers": {"Retry-After": "1"}}),
    "server error": ("status", {"status": 500}),
    "unavailable": ("status", {"status": 503}),
    "no answer": ("reset", {}),
    "broken off": ("drop", {"after": 700}),
    "broken off at once": ("drop", {"after": 0}),
}


@both
@pytest.mark.parametrize("name", PASSING)
def test_a_temporary_fault(name: str, partial: bool, hub: MiniHub, published: str, cache_dir: str) -> None:
    kind, options = PASSING[name]
    hub.fail("GET /cdn/", kind, times=1, **options)
    loaded = load(published, cache_dir, partial)
    assert not [fault for fault in hub.faults if fault.times > 0], "the fault did not happen"
    assert_slice(loaded, sound()) if partial else assert_same(loaded, sound())


@both
@pytest.mark.parametrize("name", PASSING)
def test_a_permanent_fault(name: str, partial: bool, hub: MiniHub, published: str, cache_dir: str) -> None:
    kind, options = PASSING[name]
    hub.fail("GET /cdn/", kind, times=-1, **options)
    with pytest.raises(MissingFileError, match="model.safetensors of .* could not be fetched.*try again"):
        load(published, cache_dir, partial)
    assert not list(Path(cache_dir).rglob("*.safetensors"))
    hub.faults.clear()
    loaded = load(published, cache_dir, partial)
    assert_slice(loaded, sound()) if partial else assert_same(loaded, sound())


@pytest.mark.parametrize("after", [0, 5, 900, 50_000])
def test_a_corrupt_download_is_fetched_again(
    after: int, hub: MiniHub, published: str, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("GET /cdn/.*model.safetensors", "corrupt", times=1 if after < 32_768 else 2, after=after)
    try:
        loaded = load(published, cache_dir, False)
    except CheckpointError as error:  # the header is read separately, and was corrupt
        assert "corrupt" in str(error) or "cannot be read" in str(error)
        loaded = load(published, cache_dir, False)
    assert_same(loaded, sound())


@pytest.mark.parametrize("after", [0, 5, 900, 50_000])
def test_a_source_that_is_always_corrupt(after: int, hub: MiniHub, published: str, cache_dir: str) -> None:
    hub.fail("GET /cdn/", "corrupt", times=-1, after=after)
    with pytest.raises(CheckpointError, match="corrupt|cannot be read|NaN"):
        load(published, cache_dir, False)
    hub.faults.clear()
    assert_same(load(published, cache_dir, False), sound())


@both
def test_content_that_is_shorter_than_announced(partial: bool, hub: MiniHub, published: str, cache_dir: str) -> None:
    hub.fail("GET /cdn/", "truncate", times=-1, after=700)
    with pytest.raises(SAEError):
        load(published, cache_dir, partial)
    hub.faults.clear()
    loaded = load(published, cache_dir, partial)
    assert_slice(loaded, sound()) if partial else assert_same(loaded, sound())


@pytest.mark.parametrize("kind", ["norange", "onerange", "merge", "wrongrange"])
@pytest.mark.parametrize("times", [1, 3, -1])
def test_a_server_that_answers_ranges_wrongly(
    kind: str, times: int, hub: MiniHub, published: str, cache_dir: str
) -> None:
    hub.fail("GET /cdn/", kind, times=times, after=100)
    assert_slice(load(published, cache_dir, True), sound())


@both
@pytest.mark.parametrize("value", ["0" * 64, "0" * 40, "short"])
def test_a_wrong_etag(value: str, partial: bool, hub: MiniHub, published: str, cache_dir: str) -> None:
    hub.fail(".*/resolve/.*safetensors", "etag", times=-1, value=value)
    try:
        loaded = load(published, cache_dir, partial)
    except SAEError as error:
        assert "corrupt" in str(error) or "could not be fetched" in str(error)
        assert not partial
    else:
        assert_slice(loaded, sound()) if partial else assert_same(loaded, sound())


@both
def test_an_expired_signed_address(partial: bool, hub: MiniHub, published: str, cache_dir: str) -> None:
    if partial:
        hub.fail("GET /cdn/", "status", times=1, status=403)
        assert_slice(load(published, cache_dir, True), sound())
    hub.fail("GET /cdn/", "status", times=-1, status=403)
    with pytest.raises(MissingFileError, match="could not be fetched"):
        load(published, cache_dir + "2", partial)


@both
@pytest.mark.parametrize("closing", ["gated", "private", "gone", "deleted"])
def test_repositories_without_access(
    closing: str, partial: bool, hub: MiniHub, published: str, cache_dir: str
) -> None:
    phrase = {"gated": "is gated: accept its conditions", "private": "neither a folder", "gone": "has no revision"}
    arguments: dict[str, Any] = {"token": "hf_bob", **({"latents": LATENTS} if partial else {})}
    if closing == "gated":
        hub.repo(published).gated = "auto"
    elif closing == "private":
        hub.repo(published).private = True
    elif closing == "gone":
        arguments["revision"] = "0123456789" * 4
    else:
        HfApi().delete_repo(published)
    with pytest.raises(MissingFileError, match=phrase.get(closing, "neither a folder")):
        SAEModel.from_pretrained(published, cache_dir=cache_dir, **arguments)


def test_a_file_that_vanished_after_the_listing(hub: MiniHub, published: str, cache_dir: str) -> None:
    hub.fail(
        ".*/resolve/.*model.safetensors", "status", times=-1, status=404, headers={"X-Error-Code": "EntryNotFound"}
    )
    with pytest.raises(MissingFileError, match="no model.safetensors of .* on the Hub"):
        load(published, cache_dir, True)


def test_many_latents_do_not_make_a_request_that_is_too_long(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example("topk", site="resid_post.1", d_in=1100, d_sae=1000)
    sae.push_to_hub(repo_id)
    hub.requests.clear()
    wanted = list(range(0, 1000, 2))
    assert_slice(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, latents=wanted), sae, wanted)
    asked = [span for _, path, _, span, _ in hub.requests if span]
    assert max(map(len, asked)) < 4096 and len(asked) < 20
