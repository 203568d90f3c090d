"""Converting checkpoints of other libraries to the native layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, PublishError
from hf_gated_sae.hub import locate
from hf_gated_sae.publishing import convert, read_facts
from hf_gated_sae.publishing.stated_licence import stated_licence
from tests.support.cards import require_valid
from tests.support.example_saes import assert_same, example
from tests.support.foreign import CARD, example_files, seed_gemma_scope
from tests.support.hub_state import commits, files
from tests.support.mini_hub import MiniHub, read_card

ADDRESS = "layer_0/width_16k/average_l0_71"
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.fixture
def theirs(repo_id: str) -> str:
    return repo_id.replace("alice/", "google-") + "/gemma-scope-2b-pt-res"


def folder_of(root: Path) -> Path:
    example_files("gemma_scope", root)
    return root / "google" / "gemma-scope-2b-pt-res"


def test_the_converted_sae_is_the_original(hub: MiniHub, theirs: str, tmp_path: Path, cache_dir: str) -> None:
    commit = seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    conversion = convert(theirs, ADDRESS, cache_dir=cache_dir)
    assert not list(Path(cache_dir).rglob("params.npz")), "no weights are read before they are needed"
    assert conversion.save(tmp_path / "ours") == tmp_path / "ours"
    original = SAEModel.from_pretrained(theirs, ADDRESS, cache_dir=cache_dir)
    converted = SAEModel.from_pretrained(tmp_path / "ours")
    assert_same(converted, original)
    assert converted.checkpoint.format == "native"
    facts = read_facts(tmp_path / "ours")
    assert facts.provenance["converted from"] == f"{theirs}@{commit}"
    assert facts.provenance["address"] == ADDRESS and facts.provenance["original layout"] == "gemma_scope"
    assert facts.license == "cc-by-4.0" and not facts.metrics and not facts.comparisons


def test_the_command_of_the_card_gives_the_same_bytes(hub: MiniHub, theirs: str, tmp_path: Path) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    first = convert(theirs, ADDRESS, dtype="bfloat16")
    first.save(tmp_path / "first")
    hub.seed(theirs, {f"{ADDRESS}/params.npz": b"changed since"})
    words = first.command.split()
    assert words[:2] == ["hf-gated-sae", "convert"]
    assert first.command in (tmp_path / "first" / "README.md").read_text()
    options = dict(zip(words[4::2], words[5::2], strict=True))
    again = convert(words[2], words[3], revision=options["--revision"], dtype=options["--dtype"])
    again.save(tmp_path / "again")
    for name in ("model.safetensors", "sae_metrics.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert torch.bfloat16 == SAEModel.from_pretrained(tmp_path / "again").W_dec.dtype


def test_the_card_names_the_original(hub: MiniHub, theirs: str, tmp_path: Path) -> None:
    commit = seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    convert(theirs, ADDRESS).save(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    for phrase in (
        "Converted, not trained,",
        f"[{theirs}](https://huggingface.co/{theirs}/tree/{commit})",
        f"`{ADDRESS}`",
        "Nothing has been measured",
        "- licence: cc-by-4.0",
        "metadata of the source's README.md",
        "`b_dec` is not subtracted",
        "Cite the authors of the original",
    ):
        assert phrase in card
    assert "rajamanoharan" not in card and str(tmp_path) not in card
    data = read_card(card)
    assert data["license"] == "cc-by-4.0" and data["base_model"] == "google/gemma-2-2b" and "model-index" not in data
    require_valid(ModelCard(card))


def test_pushed_in_one_commit(hub: MiniHub, theirs: str, repo_id: str, tmp_path: Path, cache_dir: str) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    convert(theirs, ADDRESS).push(repo_id, subfolder="resid_post.0")
    assert len(commits(hub, repo_id)) == 1 and ADDRESS in commits(hub, repo_id)[0]
    loaded = SAEModel.from_pretrained(repo_id, "resid_post.0", cache_dir=cache_dir)
    assert_same(loaded, SAEModel.from_pretrained(theirs, ADDRESS, cache_dir=cache_dir))
    index = json.loads(files(hub, repo_id)["sae_set.json"])["saes"]["resid_post.0"]
    assert index["conversion"]["address"] == ADDRESS and index["metrics"] == {}


@pytest.mark.parametrize(
    "extra, licence, phrase",
    [
        ({}, None, "the source states none"),
        ({"README.md": CARD}, "cc-by-4.0", "metadata of the source's README.md"),
        ({"README.md": "---\nlicense: [mit, apache-2.0]\n---\n"}, "other", "mit or apache-2.0"),
        ({"README.md": "---\nlicense: other\n---\n"}, None, "states 'other' without a name"),
        ({"README.md": "---\nlicense: other\nlicense_name: gemma\n---\n"}, "other", "gemma"),
        ({"README.md": "---\nlicense: unknown\n---\n"}, None, "it is unknown"),
        ({"README.md": "---\nlicense: {\n---\n"}, None, "cannot be read"),
        ({"README.md": "---\nlicense: 2020-99-99\n---\n"}, None, "cannot be read"),
        ({"README.md": "---\n- license\n---\n", "LICENSE": APACHE}, "apache-2.0", "text of the source's LICENSE"),
        ({"README.md": "# no metadata", "LICENSE.md": APACHE}, "apache-2.0", "LICENSE.md"),
        ({"LICENSE": "All rights reserved."}, None, "not one of the licences that are recognised"),
        ({"LICENSE": b"\xff\xfe\x00"}, None, "not one of"),
        ({"README.md": b"---\nlicense: \xff\xfe\n---\n"}, None, "README.md cannot be read"),
        ({"README.md": CARD.encode("utf-16")}, None, "README.md cannot be read"),
        ({"README.md": b"\xef\xbb\xbf" + CARD.encode()}, "cc-by-4.0", "metadata of the source's README.md"),
        ({"README.md": "---\nlicense: Apache License, Version 2.0\n---\n"}, "apache-2.0", "README.md"),
        ({"README.md": "---\nlicense: my-own\n---\n"}, "other", "README.md: my-own"),
        ({f"{ADDRESS}/README.md": "---\nlicense: mit\n---\n", "README.md": CARD}, "mit", f"{ADDRESS}/README.md"),
        ({f"{ADDRESS}/README.md": "# mine", "README.md": CARD}, "cc-by-4.0", "README.md"),
    ],
)
def test_the_licence_is_what_the_source_says(
    tmp_path: Path, extra: dict[str, str | bytes], licence: str | None, phrase: str
) -> None:
    for name, content in extra.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / ADDRESS).mkdir(parents=True, exist_ok=True)
    (tmp_path / ADDRESS / "params.npz").touch()
    found = stated_licence(locate(str(tmp_path)).at(ADDRESS))
    assert found.name == licence and phrase in found.evidence


def test_an_unknown_licence_is_stated_and_not_published(
    hub: MiniHub, theirs: str, repo_id: str, tmp_path: Path, cache_dir: str
) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs", card=None)
    conversion = convert(theirs, ADDRESS, cache_dir=cache_dir)
    with pytest.raises(PublishError, match="licence of .* is not known .*states none.*--license.*--private"):
        conversion.push(repo_id)
    assert ("models", repo_id) not in hub.repos and not list(Path(cache_dir).rglob("params.npz"))
    conversion.push(repo_id, private=True)
    assert hub.repo(repo_id).private
    assert "licence: unknown" in files(hub, repo_id)["README.md"].decode()
    conversion.push(repo_id)  # the repository exists and is private
    convert(theirs, ADDRESS, license="MIT").push(repo_id + "-public")
    card = files(hub, repo_id + "-public")["README.md"].decode()
    assert "licence: mit" in card and "the publisher of this copy; the source states none" in card


def test_a_licence_is_not_changed(hub: MiniHub, theirs: str, tmp_path: Path) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    with pytest.raises(InputError, match="published under 'cc-by-4.0'"):
        convert(theirs, ADDRESS, license="mit")
    assert convert(theirs, ADDRESS, license="CC-BY-4.0").licence.name == "cc-by-4.0"
    for nothing in ("", "unknown"):
        with pytest.raises(InputError, match="licence identifier"):
            convert(theirs, ADDRESS, license=nothing)


@pytest.mark.parametrize(
    ("terms", "phrase"),
    [
        ({"license": "apche-2.0"}, "Did you mean 'apache-2.0'"),
        ({"license": "other"}, "license_name="),
        ({"license_name": "mine"}, "without license='other'"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_source_is_read(
    hub: MiniHub, theirs: str, terms: dict[str, str], phrase: str
) -> None:
    hub.requests.clear()
    with pytest.raises(InputError, match=phrase):
        convert(theirs, ADDRESS, **terms)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("stated", "name", "link"),
    [
        ("license: other\nlicense_name: x-1.0\nlicense_link: LICENSE", "x-1.0", "/blob/{}/LICENSE"),
        ("license: other\nlicense_name: x-1.0\nlicense_link: https://x.org/1", "x-1.0", "https://x.org/1"),
        ("license: x-1.0", "x-1.0", "/tree/{}"),
        ("license: [mit, x-1.0]", "mit or x-1.0", "/tree/{}"),
    ],
)
def test_another_licence_keeps_its_name(
    hub: MiniHub, theirs: str, repo_id: str, tmp_path: Path, stated: str, name: str, link: str
) -> None:
    commit = seed_gemma_scope(hub, theirs, tmp_path / "theirs", card=f"---\n{stated}\n---\n")
    convert(theirs, ADDRESS).push(repo_id)
    data = read_card(files(hub, repo_id)["README.md"].decode())
    assert (data["license"], data["license_name"]) == ("other", name)
    expected = link if link.startswith("https:") else f"https://huggingface.co/{theirs}{link.format(commit)}"
    assert data["license_link"] == expected


def test_a_source_that_is_not_pinned(hub: MiniHub, repo_id: str, tmp_path: Path) -> None:
    """A local folder can be converted, but not published: nobody could check the copy."""
    folder = folder_of(tmp_path / "theirs")
    (folder / "README.md").write_text(CARD)
    conversion = convert(folder, "layer_1/width_16k/average_l0_71")
    conversion.save(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "a local folder" in card and str(tmp_path) not in card and "hf-gated-sae convert" not in card
    with pytest.raises(PublishError, match="folder on this machine.*--private"):
        conversion.push(repo_id)
    assert ("models", repo_id) not in hub.repos
    conversion.push(repo_id, private=True)
    assert str(tmp_path) not in files(hub, repo_id)["README.md"].decode()
    assert str(tmp_path) not in hub.repo(repo_id).at("main").title


def test_a_gated_source_stays_behind_a_gate(
    hub: MiniHub, theirs: str, repo_id: str, tmp_path: Path, cache_dir: str
) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs")
    hub.repo(theirs).gated = "manual"
    with pytest.raises(MissingFileError, match="gated: accept its conditions"):
        convert(theirs, ADDRESS, cache_dir=cache_dir)
    hub.repo(theirs).allowed.add("alice")
    conversion = convert(theirs, ADDRESS, cache_dir=cache_dir)
    with pytest.raises(PublishError, match="is gated, and a copy without a gate"):
        conversion.push(repo_id)
    assert ("models", repo_id) not in hub.repos
    conversion.push(repo_id + "-private", private=True)
    HfApi().create_repo(repo_id)
    HfApi().update_repo_settings(repo_id, gated="manual")
    conversion.push(repo_id)


def test_a_private_source_stays_private(hub: MiniHub, repo_id: str, tmp_path: Path) -> None:
    source = "alice/private-" + repo_id.split("/")[1][:60]
    seed_gemma_scope(hub, source, tmp_path / "theirs")
    hub.repo(source).private = True
    with pytest.raises(PublishError, match="is not public"):
        convert(source, ADDRESS).push(repo_id)


def test_a_failure_leaves_nothing_behind(theirs: str, hub: MiniHub, repo_id: str, tmp_path: Path, monkeypatch) -> None:
    seed_gemma_scope(hub, theirs, tmp_path / "theirs")

    def fail(*_: object, **__: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr("hf_gated_sae.publishing.save_published.write_extras", fail)
    with pytest.raises(InputError, match="disk is full"):
        convert(theirs, ADDRESS).save(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="disk is full"):
        convert(theirs, ADDRESS).save(tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]
    hub.fail("POST .*/commit/.*", "status", times=-1, status=400)
    monkeypatch.undo()
    with pytest.raises(PublishError, match="nothing was committed"):
        convert(theirs, ADDRESS).push(repo_id)
    assert commits(hub, repo_id) == []


def test_an_original_is_not_overwritten(hub: MiniHub, tmp_path: Path, repo_id: str) -> None:
    folder = folder_of(tmp_path / "theirs") / "layer_1/width_16k/average_l0_71"
    before = sorted(path.name for path in folder.iterdir())
    conversion = convert(folder)
    with pytest.raises(InputError, match="holds a checkpoint in the layout gemma_scope"):
        conversion.save(folder)
    other = folder_of(tmp_path / "other") / "embedding/width_4k/average_l0_6"
    with pytest.raises(InputError, match="holds a checkpoint in the layout gemma_scope"):
        conversion.save(other)
    assert sorted(path.name for path in folder.iterdir()) == before
    seed_gemma_scope(hub, repo_id, tmp_path / "seed")
    with pytest.raises(InputError, match="overwrite its own original"):
        convert(repo_id, ADDRESS).push(repo_id, subfolder=f"/{ADDRESS}/")


def test_converting_into_a_folder_again_replaces_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs")
    convert(folder, "layer_1/width_16k/average_l0_71").save(tmp_path / "ours")
    with (tmp_path / "ours" / "README.md").open("a") as readme:
        readme.write("\nMy notes.\n")
    convert(folder, "embedding/width_4k/average_l0_6").save(tmp_path / "ours")
    assert SAEModel.from_pretrained(tmp_path / "ours").config.site == "embed"
    assert "My notes." in (tmp_path / "ours" / "README.md").read_text()


def test_checkpoints_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    example().save_pretrained(tmp_path / "native")
    with pytest.raises(InputError, match="already in the native layout"):
        convert(tmp_path / "native")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="no SAE in a known format"):
        convert(tmp_path / "empty")
    folder = folder_of(tmp_path / "theirs")
    with pytest.raises(MissingFileError, match="folders or files in it do"):
        convert(folder)
    with pytest.raises(InputError, match="dtype is 'bfloat61'.*bfloat16"):
        convert(folder, "layer_1/width_16k/average_l0_71", dtype="bfloat61")
    with pytest.raises(MissingFileError, match="no folder 'layer_9'"):
        convert(folder, "layer_9")


def test_the_card_of_a_transcoder(tmp_path: Path) -> None:
    example_files("gemma_scope", tmp_path / "theirs")
    source = tmp_path / "theirs" / "google" / "gemma-scope-2b-pt-transcoders"
    convert(source, "layer_1/width_16k/average_l0_6").save(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "A transcoder" in card and "Splice" not in card and "| writes | `mlp_out.1` |" in card
    assert "rms_norm" in card and "transcoder" in read_card(card)["tags"]
