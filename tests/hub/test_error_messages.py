"""Loading and publishing offline, with a broken Hub, without permission, and with mistyped names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import InputError, MissingFileError, PublishError
from hf_gated_sae.publishing import CardFacts
from tests.support.example_saes import assert_same, example
from tests.support.hub_state import files
from tests.support.mini_hub import MiniHub

pytestmark = pytest.mark.slow

BOB = "hf_bob"


@pytest.mark.parametrize("shards", [None, 200])
def test_second_load_is_offline(hub: MiniHub, repo_id: str, cache_dir: str, shards: int | None) -> None:
    sae = example()
    sae.push_to_hub(repo_id, subfolder="a", max_shard_size=shards)
    with pytest.raises(MissingFileError, match="not in the Hub cache"):
        SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir, local_files_only=True)
    online = SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir)
    hub.requests.clear()
    offline = SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir, local_files_only=True)
    assert not hub.requests
    assert_same(sae, offline)
    assert offline.checkpoint == online.checkpoint
    with pytest.raises(MissingFileError, match="no folder 'b'"):
        SAEModel.from_pretrained(repo_id, "b", cache_dir=cache_dir, local_files_only=True)


def test_offline_environment_in_a_fresh_process(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    code = (
        "from hf_gated_sae import SAEModel\n"
        f"sae = SAEModel.from_pretrained({repo_id!r}, cache_dir={cache_dir!r})\n"
        "print(sae.checkpoint.revision)\n"
        f"try: SAEModel.from_pretrained('alice/never-seen', cache_dir={cache_dir!r})\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    hub.requests.clear()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    revision, message = done.stdout.strip().split("\n")
    assert revision == hub.repo(repo_id).at("main").id and not hub.requests
    assert "not in the Hub cache" in message and "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("kind, options", [("status", {"status": 503}), ("reset", {})])
def test_a_hub_that_is_down_is_replaced_by_the_cache(
    hub: MiniHub, repo_id: str, cache_dir: str, kind: str, options: dict[str, int]
) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    first = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    hub.fail(".*", kind, times=-1, **options)
    again = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert_same(sae, again)
    assert again.checkpoint.revision == first.checkpoint.revision


@pytest.mark.parametrize(
    "kind, options", [("status", {"status": 500}), ("truncate", {"after": 100}), ("drop", {"after": 100})]
)
def test_a_broken_download_leaves_no_file_that_is_loaded_later(
    hub: MiniHub,
    repo_id: str,
    cache_dir: str,
    kind: str,
    options: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
    sae = example()
    sae.push_to_hub(repo_id)
    hub.fail("GET /cdn/", kind, times=-1, **options)
    with pytest.raises(MissingFileError, match="model.safetensors of .* could not be fetched"):
        SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    weights = list(Path(cache_dir).rglob("*.safetensors"))
    assert weights == []
    hub.faults.clear()
    assert_same(sae, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir))


def test_force_download_heals_a_corrupt_cache(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    folder = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir).checkpoint.folder
    (folder / "model.safetensors").resolve().write_bytes(b"rubbish")
    assert_same(sae, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, force_download=True))


def test_force_download_contradicts_offline(
    hub: MiniHub, repo_id: str, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example().push_to_hub(repo_id)
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    forced = {"cache_dir": cache_dir, "force_download": True}
    hub.requests.clear()
    with pytest.raises(
        InputError, match="force_download=True, which downloads .* again, and local_files_only=True, which"
    ):
        SAEModel.from_pretrained(repo_id, local_files_only=True, **forced)
    monkeypatch.setattr("hf_gated_sae.hub.repository.is_offline_mode", lambda: True)
    with pytest.raises(InputError, match="and HF_HUB_OFFLINE=1, which forbids downloads: omit one of them"):
        SAEModel.from_pretrained(repo_id, **forced)
    assert hub.requests == []


def test_force_download_does_not_use_the_cache_when_the_hub_is_down(
    hub: MiniHub, repo_id: str, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    example().push_to_hub(repo_id)
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    hub.fail(".*", "status", times=-1, status=503)
    with pytest.raises(MissingFileError, match="could not be fetched from the Hub"):
        SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, force_download=True)


def test_a_local_folder_is_loaded_offline_whatever_is_forced(tmp_path: Path) -> None:
    example().save_pretrained(tmp_path)
    assert_same(example(), SAEModel.from_pretrained(tmp_path, local_files_only=True, force_download=True))


@pytest.mark.parametrize(
    "given, phrase",
    [
        ({"repo": "alice/nothing-here"}, "neither a folder 'alice/nothing-here' nor a model repository"),
        ({"repo": "nothing-here"}, "neither a folder 'nothing-here' nor"),
        ({"repo": "a/b/c"}, "the second argument, subfolder"),
        ({"repo": "./nothing"}, "There is no folder './nothing'"),
        ({"repo": "/nothing"}, "There is no folder '/nothing'"),
        ({"revision": "v7"}, "no revision 'v7'"),
        ({"subfolder": "resid_pots.1"}, "no folder 'resid_pots.1'. Did you mean 'resid_post.1'"),
        ({"subfolder": ""}, "pass subfolder= one of 'resid_post.1'"),
    ],
)
def test_wrong_names(hub: MiniHub, given: dict[str, str], phrase: str) -> None:
    if "alice/wrong-names" not in {name for _, name in hub.repos}:
        example().push_to_hub("alice/wrong-names", subfolder="resid_post.1")
    arguments = {"subfolder": "resid_post.1", **given}
    with pytest.raises(MissingFileError) as raised:
        SAEModel.from_pretrained(arguments.pop("repo", "alice/wrong-names"), **arguments)
    assert phrase in str(raised.value)


@pytest.mark.parametrize("name", ["has space/x", "x--y", "alice/" + "n" * 120])
def test_impossible_names(name: str) -> None:
    with pytest.raises(InputError, match="cannot be a Hub repository"):
        SAEModel.from_pretrained(name)
    with pytest.raises(InputError, match="expected 'owner/name'"):
        example().push_to_hub(name)


def test_two_revisions_contradict() -> None:
    with pytest.raises(InputError, match="two revisions"):
        SAEModel.from_pretrained("alice/x@v1", revision="v2")


@pytest.mark.parametrize("token", [False, BOB, "hf_read", "hf_wrong"])
def test_no_right_to_publish(hub: MiniHub, repo_id: str, token: str | bool) -> None:
    example().push_to_hub(repo_id)
    before = hub.repo(repo_id).at("main").id
    with pytest.raises(PublishError, match="write access"):
        example("standard").push_to_hub(repo_id, token=token)
    assert hub.repo(repo_id).at("main").id == before


def test_a_race_is_noticed(hub: MiniHub, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example().push_to_hub(repo_id)
    commit = HfApi.create_commit

    def somebody_is_faster(self: HfApi, *args: object, **kwargs: object) -> object:
        hub.seed(repo_id, {"faster.txt": "!"})
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", somebody_is_faster)
    with pytest.raises(PublishError, match="changed while this was being published"):
        example("standard").push_to_hub(repo_id)
    assert "faster.txt" in files(hub, repo_id)


def test_a_failed_save_leaves_no_repository(hub: MiniHub, repo_id: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        example().push_to_hub(repo_id, facts=CardFacts(training={"optimiser": object()}))
    assert not HfApi().repo_exists(repo_id)


def test_a_rejected_token(hub: MiniHub, repo_id: str) -> None:
    example().push_to_hub(repo_id)
    with pytest.raises(MissingFileError, match="The Hub refuses .* to this token .*hf auth login"):
        SAEModel.from_pretrained(repo_id, token="hf_expired")


def test_offline_after_a_few_latents(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    example().push_to_hub(repo_id)
    SAEModel.from_pretrained(repo_id, latents=[1], cache_dir=cache_dir)
    with pytest.raises(MissingFileError, match="; only cached files are listed"):
        SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, local_files_only=True)
