"""push_to_hub and from_pretrained with the real client, over the loopback Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from hf_gated_sae import SAEModel
from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError, MissingFileError, PublishError
from hf_gated_sae.publishing import CardFacts, push_to_hub, read_facts
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub, read_card

BOB = "hf_bob"


def files(hub: MiniHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """Return the content of a repository."""
    commit = hub.repo(repo_id).at(revision)
    return {path: hub.blob(file.sha256).read_bytes() for path, file in commit.files.items()}


def commits(hub: MiniHub, repo_id: str, revision: str = "main") -> list[str]:
    """Return the titles of a branch's commits, the newest first, without the one that the Hub itself makes."""
    repo = hub.repo(repo_id)
    titles, commit = [], repo.at(revision)
    while commit.parent is not None:
        titles.append(commit.title)
        commit = repo.commits[commit.parent]
    return titles


@pytest.mark.parametrize("architecture", list(architectures))
def test_what_is_pushed_is_what_is_loaded(hub: MiniHub, repo_id: str, cache_dir: str, architecture: str) -> None:
    sae = example(architecture, site="resid_post.2", base_model="acme/lm", base_model_revision="c0ffee" * 6 + "c0ff")
    commit = sae.push_to_hub(repo_id)
    loaded = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert_same(sae, loaded)
    assert loaded.checkpoint.revision == commit.oid == hub.repo(repo_id).at("main").id
    assert (loaded.checkpoint.repo, loaded.checkpoint.subfolder) == (repo_id, "")
    assert not loaded.training


def test_one_push_is_one_commit_with_everything_in_it(hub: MiniHub, repo_id: str) -> None:
    commit = example().push_to_hub(repo_id, commit_message="First try", commit_description="See the card.")
    assert commits(hub, repo_id) == ["First try"]
    assert hub.repo(repo_id).at("main").message == "See the card."
    assert commit.oid == hub.repo(repo_id).at("main").id
    assert set(files(hub, repo_id)) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "sae_metrics.json"
    }  # fmt: skip


def test_subfolder_has_its_own_card_and_the_root_lists_it(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    first, second = example(site="resid_post.1"), example("topk", site="mlp_out.1")
    push_to_hub(first, repo_id, subfolder="resid_post.1/gated", facts=CardFacts(metrics={"l0": 12.5}))
    push_to_hub(second, repo_id, subfolder="/mlp_out.1/")
    assert len(commits(hub, repo_id)) == 2
    assert_same(first, SAEModel.from_pretrained(repo_id, "resid_post.1/gated", cache_dir=cache_dir))
    assert_same(second, SAEModel.from_pretrained(repo_id, subfolder="mlp_out.1", cache_dir=cache_dir))
    root = files(hub, repo_id)["README.md"].decode()
    rows = [line for line in root.splitlines() if line.startswith("| [`")]
    assert [row.split("`")[1] for row in rows] == ["mlp_out.1", "resid_post.1/gated"]
    assert "not measured" in rows[0] and "| 12.5 |" in rows[1]
    assert {"sparse-autoencoder", "gated-sae", "topk-sae"} <= set(read_card(root)["tags"])
    card = files(hub, repo_id)["mlp_out.1/README.md"].decode()
    assert 'subfolder="mlp_out.1"' in card and "config.json" not in files(hub, repo_id)


def test_the_index_follows_the_repository(hub: MiniHub, repo_id: str, tmp_path: Path) -> None:
    """SAEs uploaded by other means appear, removed ones disappear."""
    example("standard", site="resid_post.7").save_pretrained(tmp_path)
    api = HfApi()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path, path_in_repo="by_hand")
    push_to_hub(example(), repo_id, subfolder="a")
    push_to_hub(example(), repo_id, subfolder="b")
    api.delete_folder("a", repo_id)
    push_to_hub(example(), repo_id, subfolder="c")
    rows = [line for line in files(hub, repo_id)["README.md"].decode().splitlines() if line.startswith("| [`")]
    assert [row.split("`")[1] for row in rows] == ["b", "by_hand", "c"]
    assert "standard" in rows[1] and "resid_post.7" in rows[1]


def test_pushing_again_replaces_the_sae_and_nothing_else(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    other = {"notes.txt": "mine", "a/figure.png": b"\x89PNG", "b/model.safetensors": b"not ours", "a/model_old.txt": "x"}
    example().push_to_hub(repo_id, subfolder="a", max_shard_size=200)
    shards = {name for name in files(hub, repo_id) if name.startswith("a/model-0")}
    assert len(shards) > 1
    hub.seed(repo_id, other)
    again = example("standard")
    again.push_to_hub(repo_id, subfolder="a")
    after = files(hub, repo_id)
    assert not shards & set(after) and "a/model.safetensors.index.json" not in after
    assert {name: after[name] for name in other} == {
        name: data if isinstance(data, bytes) else data.encode() for name, data in other.items()
    }
    assert_same(again, SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir))


def test_a_readme_written_by_hand_is_kept(hub: MiniHub, repo_id: str) -> None:
    by_hand = "---\nlicense: mit\ntags:\n- mine\nlanguage: de\n---\n\n# My thesis\n\nRead *this* first.\n"
    hub.seed(repo_id, {"README.md": by_hand})
    push_to_hub(example(), repo_id, subfolder="a", facts=CardFacts(license="apache-2.0"))
    push_to_hub(example(), repo_id, subfolder="b")
    push_to_hub(example(), repo_id)
    text = files(hub, repo_id)["README.md"].decode()
    assert "# My thesis\n\nRead *this* first." in text
    assert text.count("# My thesis") == 1 and text.count("index: end") == 1 and text.count("card: end") == 1
    data = read_card(text)
    assert data["license"] == "mit" and data["language"] == "de" and "mine" in data["tags"]
    assert data["library_name"] == "hf-gated-sae"


def test_the_card_is_there_and_valid(hub: MiniHub, repo_id: str) -> None:
    facts = CardFacts(
        metrics={"l0": 20.0, "fvu": 0.1}, evaluation={"dataset": "acme/text", "tokens": 1000}, license="apache-2.0"
    )
    example(site="resid_post.2", base_model="acme/lm").push_to_hub(repo_id, facts=facts)
    ModelCard.load(repo_id).validate()
    info = HfApi().model_info(repo_id)
    assert info.library_name == "hf-gated-sae" and info.pipeline_tag == "feature-extraction"
    wanted = {"sparse-autoencoder", "gated-sae", "interpretability", "resid_post.2", "license:apache-2.0"}
    assert wanted | {"base_model:acme/lm"} <= set(info.tags)
    results = {result.metric_type: result.metric_value for result in info.card_data.eval_results}
    assert results == {"l0": 20.0, "fvu": 0.1}
    assert info.card_data.eval_results[0].dataset_type == "acme/text"


def test_private_repository(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example()
    sae.push_to_hub(repo_id, private=True)
    assert hub.repo(repo_id).private
    assert_same(sae, SAEModel.from_pretrained(repo_id, token="hf_alice", cache_dir=cache_dir))
    for token in (False, BOB):
        with pytest.raises(MissingFileError, match="private.*token="):
            SAEModel.from_pretrained(repo_id, token=token, cache_dir=cache_dir + "2")


def test_private_is_not_silently_public(hub: MiniHub, repo_id: str) -> None:
    hub.seed(repo_id, {"notes.txt": "public"})
    with pytest.raises(PublishError, match="exists and is public"):
        example().push_to_hub(repo_id, private=True)
    assert "model.safetensors" not in files(hub, repo_id)


def test_gated_repository(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    HfApi().update_repo_settings(repo_id, gated="auto")
    with pytest.raises(MissingFileError, match="gated: accept its conditions"):
        SAEModel.from_pretrained(repo_id, token=BOB, cache_dir=cache_dir)
    hub.repo(repo_id).allowed.add("bob")
    assert_same(sae, SAEModel.from_pretrained(repo_id, token=BOB, cache_dir=cache_dir))


def test_pull_request(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    first, second = example(), example("standard")
    first.push_to_hub(repo_id)
    commit = second.push_to_hub(repo_id, create_pr=True, token=BOB)
    assert commit.pr_num == 1 and len(commits(hub, repo_id)) == 1
    assert_same(first, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir))
    proposed = SAEModel.from_pretrained(repo_id, revision="refs/pr/1", cache_dir=cache_dir)
    assert_same(second, proposed)
    assert proposed.checkpoint.revision == commit.oid
    second.push_to_hub(repo_id, revision="refs/pr/1", facts=CardFacts(metrics={"l0": 1.0}))
    assert len(commits(hub, repo_id, "refs/pr/1")) == 3


def test_pull_request_goes_to_main_only(hub: MiniHub, repo_id: str) -> None:
    with pytest.raises(InputError, match="a pull request always goes to the main branch"):
        example().push_to_hub(repo_id, create_pr=True, revision="dev")
    assert not HfApi().repo_exists(repo_id)


def test_branch_tag_and_commit(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    old, new = example("gated"), example("jumprelu")
    commit = old.push_to_hub(repo_id).oid
    HfApi().create_tag(repo_id, tag="v1")
    new.push_to_hub(repo_id, revision="dev")
    for revision, wanted in {None: old, "main": old, "v1": old, commit: old, "dev": new}.items():
        assert_same(wanted, SAEModel.from_pretrained(repo_id, revision=revision, cache_dir=cache_dir))
    assert_same(new, SAEModel.from_pretrained(f"{repo_id}@dev", cache_dir=cache_dir))


def test_configuration_and_weights_come_from_one_commit(
    hub: MiniHub, repo_id: str, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves on between the two downloads; both still come from the commit that was resolved first."""
    from hf_gated_sae.hub import repository

    old, new = example("gated"), example("standard", d_in=5)
    old.push_to_hub(repo_id)
    download, moved = repository.hf_hub_download, []

    def move_on(repo: str, path: str, **kwargs: object) -> str:
        local = download(repo, path, **kwargs)
        if not moved:
            moved.append(new.push_to_hub(repo_id))
        return local

    monkeypatch.setattr(repository, "hf_hub_download", move_on)
    loaded = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert moved and moved[0].oid != loaded.checkpoint.revision
    assert_same(old, loaded)


def test_only_the_wanted_files_are_fetched(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    hub.seed(repo_id, {"a/examples.safetensors": b"0" * 1000, "big.safetensors": b"0" * 1000})
    example().push_to_hub(repo_id, subfolder="a")
    example().push_to_hub(repo_id, subfolder="b")
    hub.requests.clear()
    SAEModel.from_pretrained(repo_id, "a", cache_dir=cache_dir)
    fetched = {path.split("/main/")[-1].split("/", 5)[-1] for _, path, _, _, _ in hub.requests if "/resolve/" in path}
    assert fetched == {"a/config.json", "a/model.safetensors", "a/sae_metrics.json"}


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
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
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
def test_a_broken_download_leaves_nothing_that_is_loaded_later(
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
    weights = [path for path in Path(cache_dir).rglob("*.safetensors")]
    assert weights == []
    hub.faults.clear()
    assert_same(sae, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir))


def test_force_download_heals_a_corrupt_cache(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    folder = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir).checkpoint.folder
    (folder / "model.safetensors").resolve().write_bytes(b"rubbish")
    assert_same(sae, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, force_download=True))


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
    if ("alice/wrong-names" not in {name for _, name in hub.repos}):
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


def test_what_cannot_be_saved_leaves_no_repository(hub: MiniHub, repo_id: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        example().push_to_hub(repo_id, facts=CardFacts(training={"optimiser": object()}))
    assert not HfApi().repo_exists(repo_id)


def test_save_pretrained_can_publish(hub: MiniHub, repo_id: str, tmp_path: Path, cache_dir: str) -> None:
    sae = example()
    sae.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=repo_id)
    assert_same(sae, SAEModel.from_pretrained(tmp_path / "out"))
    assert_same(sae, SAEModel.from_pretrained(repo_id, cache_dir=cache_dir))


def test_facts_travel_and_are_dropped_when_the_weights_change(
    hub: MiniHub, repo_id: str, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    facts = CardFacts(metrics={"l0": 7.0}, license="mit", training={"steps": 5})
    example().push_to_hub(repo_id, facts=facts)
    loaded = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert read_facts(loaded) == facts
    loaded.push_to_hub(f"{repo_id}-copy")
    copy = SAEModel.from_pretrained(f"{repo_id}-copy", cache_dir=cache_dir, dtype=torch.bfloat16)
    assert read_facts(copy) == facts
    with torch.no_grad():
        loaded.W_dec[0] += 1.0
    changed = read_facts(loaded)
    assert changed.metrics == {} and changed.training == {} and changed.license == "mit"
    assert repo_id in changed.provenance["modified from"] and "no longer those" in caplog.text


def test_weights_on_the_hub_are_plain_safetensors(hub: MiniHub, repo_id: str, tmp_path: Path) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    (tmp_path / "w.safetensors").write_bytes(files(hub, repo_id)["model.safetensors"])
    assert set(load_file(tmp_path / "w.safetensors")) == set(sae.state_dict())
