"""Folders with files of several SAEs or libraries: unreadable files are not claimed, and `format=` chooses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.errors import CheckpointError, MissingFileError, UnknownNameError
from hf_gated_sae.formats import formats
from hf_gated_sae.publishing import convert
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def _pickled(path: Path) -> None:
    torch.save({"state": {}, "groups": [Path("not a tensor")]}, path)


def _bare(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def _legacy(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


UNREADABLE = {
    "a pickle in a torch file": (_pickled, "without running code"),
    "a bare pickle": (_bare, "is a bare pickle, which is not opened"),
    "a torch file from before 1.6": (_legacy, r"from before torch 1.6.*Save it again: torch.save\(torch.load"),
    "a git-lfs pointer": (lambda path: path.write_bytes(POINTER), "is a git-lfs pointer, not the file.*git lfs pull"),
    "an empty file": (lambda path: path.touch(), "cannot be read: it is empty"),
    "rubbish": (lambda path: path.write_bytes(b"rubbish!" * 9), "cannot be read"),
}


@pytest.mark.parametrize("kind", list(UNREADABLE))
@pytest.mark.parametrize("name", ["optimizer.pt", "gpt2-SAE-l3.pt", "ae.pt"])
def test_an_unreadable_file_does_not_prevent_loading_the_sae_beside_it(name: str, kind: str, tmp_path: Path) -> None:
    sae = example("gated", site="resid_post.1")
    sae.save_pretrained(tmp_path)
    UNREADABLE[kind][0](tmp_path / name)
    assert_same(SAEModel.from_pretrained(tmp_path), sae)
    assert SAESet.from_pretrained(tmp_path).sites == ["resid_post.1"]


def test_another_layout_beside_unreadable_files(tmp_path: Path) -> None:
    [first, *_] = formats["gemma_scope"].examples(tmp_path)
    folder = tmp_path / first.repo / first.address
    (folder / "optimizer.pt").write_bytes(POINTER)
    (folder / "config.json").write_text("no JSON")
    assert SAEModel.from_pretrained(folder).checkpoint.format == "gemma_scope"


def test_an_unreadable_file_above_saes_does_not_hide_them(tmp_path: Path) -> None:
    example("gated").save_pretrained(tmp_path / "layer_1")
    (tmp_path / "optimizer.pt").write_bytes(POINTER)
    with pytest.raises(MissingFileError, match="itself holds no SAE.*subfolder= one of 'layer_1'"):
        SAEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("kind", list(UNREADABLE))
def test_an_unreadable_file_alone_is_refused_with_the_reason(kind: str, suffix: str, tmp_path: Path) -> None:
    write, message = UNREADABLE[kind]
    write(tmp_path / f"mine{suffix}")
    for options in ({}, {"architecture": "standard"}):
        with pytest.raises(CheckpointError, match=f"mine{suffix}.*{message}"):
            SAEModel.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_in_the_place_of_our_own_files(name: str, tmp_path: Path) -> None:
    example().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}.* is a git-lfs pointer, not the file itself"):
        SAEModel.from_pretrained(tmp_path)


def test_a_pointer_as_npz(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="params.npz.* is a git-lfs pointer"):
        SAEModel.from_pretrained(tmp_path)


def test_unneeded_files_are_not_fetched(hub: MiniHub, repo_id: str, cache_dir: str, tmp_path: Path) -> None:
    sae = example("gated", site="resid_post.1")
    sae.save_pretrained(tmp_path / "sae")
    torch.save({"state": torch.zeros(50_000)}, tmp_path / "sae" / "optimizer.pt")
    hub.seed(repo_id, {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()})
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), sae)
    asked = [request[1] for request in hub.requests if repo_id in request[1]]
    assert any("model.safetensors" in path for path in asked)
    assert not any("optimizer.pt" in path for path in asked)


def test_a_repaired_file_is_read(tmp_path: Path) -> None:
    sae = example("gated", site="resid_post.1")
    sae.save_pretrained(tmp_path / "a")
    saes = SAESet.from_pretrained(tmp_path)
    sound = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        saes["a"]
    (tmp_path / "a" / "model.safetensors").write_bytes(sound)
    assert_same(saes["a"], sae)


# ---------------------------------------------------------------- format=


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder with an SAE in our layout and one in Gemma Scope's."""
    example("gated", site="resid_post.1").save_pretrained(tmp_path / "shared")
    generator = np.random.default_rng(0)
    shapes: dict[str, Any] = {"W_enc": (6, 8), "W_dec": (8, 6), "b_enc": 8, "b_dec": 6, "threshold": 8}
    arrays = {name: generator.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "shared" / "params.npz", **arrays)
    return tmp_path / "shared"


def test_format_chooses(shared: Path) -> None:
    with pytest.raises(
        CheckpointError, match="any of the formats gemma_scope, native.*choose with format='gemma_scope'"
    ):
        SAEModel.from_pretrained(shared)
    native = SAEModel.from_pretrained(shared, format="native")
    assert native.config.architecture == "gated" and native.checkpoint.format == "native"
    theirs = SAEModel.from_pretrained(shared, format="gemma_scope")
    assert theirs.checkpoint.format == "gemma_scope"
    raw = np.load(shared / "params.npz")
    x = torch.randn(4, 6)
    z = x @ torch.from_numpy(raw["W_enc"]) + torch.from_numpy(raw["b_enc"])
    torch.testing.assert_close(theirs.encode(x), torch.relu(z) * (z > torch.from_numpy(raw["threshold"])))
    assert convert(shared, format="gemma_scope").checkpoint.origin.format == "gemma_scope"


def test_an_unknown_or_wrong_format_is_refused(shared: Path) -> None:
    with pytest.raises(UnknownNameError, match="Unknown format 'gema_scope'.*Did you mean 'gemma_scope'"):
        SAEModel.from_pretrained(shared, format="gema_scope")
    with pytest.raises(CheckpointError, match="not in the layout 'saelens'.*It is in the layout gemma_scope, native"):
        SAEModel.from_pretrained(shared, format="saelens")
    (shared / "params.npz").unlink()
    with pytest.raises(CheckpointError, match="not in the layout 'gemma_scope'.*It is in the layout native"):
        SAEModel.from_pretrained(shared, format="gemma_scope")


def test_a_file_of_any_name_is_reached_by_its_format(tmp_path: Path) -> None:
    [first, *_] = formats["openai"].examples(tmp_path)
    example("gated").save_pretrained(tmp_path / "shared")
    (tmp_path / first.repo / first.address).rename(tmp_path / "shared" / "mine.pt")
    assert SAEModel.from_pretrained(tmp_path / "shared").checkpoint.format == "native"
    assert SAEModel.from_pretrained(tmp_path / "shared", "mine.pt").checkpoint.format == "openai"
    assert SAEModel.from_pretrained(tmp_path / "shared", format="openai").checkpoint.format == "openai"
