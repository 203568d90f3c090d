"""push_to_hub and from_pretrained with the real client, over the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from hf_gated_sae import SAEModel
from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError, MissingFileError, PublishError
from hf_gated_sae.publishing import CardFacts, push_to_hub, read_facts
from tests.support.cards import require_valid
from tests.support.example_saes import assert_same, example
from tests.support.hub_state import commits, files
from tests.support.mini_hub import MiniHub, read_card

BOB = "hf_bob"


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
    other = {
        "notes.txt": "mine",
        "a/figure.png": b"\x89PNG",
        "b/model.safetensors": b"not ours",
        "a/model_old.txt": "x",
    }
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


@pytest.mark.parametrize("subfolder", ["", "a"])
def test_a_readme_with_a_byte_order_mark_is_kept_without_it(hub: MiniHub, repo_id: str, subfolder: str) -> None:
    by_hand = b"\xef\xbb\xbf---\r\nlanguage: de\r\n---\r\n\r\n# My thesis\r\n"
    hub.seed(repo_id, {"README.md": by_hand, "a/README.md": by_hand})
    push_to_hub(example(), repo_id, subfolder=subfolder)
    for name in {"README.md", f"{subfolder}/README.md".strip("/")}:
        text = files(hub, repo_id)[name].decode()
        assert text.startswith("---\nlanguage: de\n") and text.count("# My thesis") == text.count("language: de") == 1
        assert read_card(text)["library_name"] == "hf-gated-sae"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["README.md", "a/README.md"])
def test_another_encoding_is_refused_before_any_upload(hub: MiniHub, repo_id: str, name: str, encoding: str) -> None:
    by_hand = "# Für meine Arbeit".encode(encoding)
    commit = hub.seed(repo_id, {name: by_hand})
    hub.requests.clear()
    with pytest.raises(PublishError, match=f"{name} of {repo_id} is not in UTF-8.*save it as UTF-8, then try again"):
        push_to_hub(example(), repo_id, subfolder="a")
    assert hub.repo(repo_id).at("main").id == commit and files(hub, repo_id)[name] == by_hand
    assert not [path for method, path, *_ in hub.requests if method == "PUT" or "preupload" in path or "lfs" in path]


@pytest.mark.parametrize(
    ("terms", "phrase"),
    [
        ({"license": "apche-2.0"}, "Did you mean 'apache-2.0'"),
        ({"license": "other", "license_name": "mine"}, "license_link="),
        ({"license": "mit", "license_link": "LICENSE"}, "only for license='other'"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_leaves_no_repository(
    hub: MiniHub, repo_id: str, terms: dict[str, str], phrase: str
) -> None:
    hub.requests.clear()
    with pytest.raises(InputError, match=phrase):
        example().push_to_hub(repo_id, facts=CardFacts(**terms))
    assert hub.requests == []


def test_the_licence_is_published_as_the_hub_spells_it(hub: MiniHub, repo_id: str, cache_dir: str) -> None:
    example().push_to_hub(repo_id, facts=CardFacts(license="Apache License 2.0"))
    assert HfApi().model_info(repo_id).card_data.license == "apache-2.0"
    assert read_facts(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)).license == "apache-2.0"


def test_the_card_is_there_and_valid(hub: MiniHub, repo_id: str) -> None:
    facts = CardFacts(
        metrics={"l0": 20.0, "fvu": 0.1}, evaluation={"dataset": "acme/text", "tokens": 1000}, license="apache-2.0"
    )
    example(site="resid_post.2", base_model="acme/lm").push_to_hub(repo_id, facts=facts)
    require_valid(ModelCard.load(repo_id))
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
    assert repo_id in changed.provenance["modified from"] and "The weights differ from those of" in caplog.text


def test_weights_on_the_hub_are_plain_safetensors(hub: MiniHub, repo_id: str, tmp_path: Path) -> None:
    sae = example()
    sae.push_to_hub(repo_id)
    (tmp_path / "w.safetensors").write_bytes(files(hub, repo_id)["model.safetensors"])
    assert set(load_file(tmp_path / "w.safetensors")) == set(sae.state_dict())
