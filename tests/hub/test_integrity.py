"""Cached content that differs from what the Hub announced is noticed; the client's cache management still works."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError
from hf_gated_sae.hub import integrity
from tests.support.example_saes import assert_same, example
from tests.support.mini_hub import MiniHub


@pytest.fixture
def blob(hub: MiniHub, repo_id: str, cache_dir: str) -> Path:
    """The cached weights of a published SAE."""
    example().push_to_hub(repo_id)
    folder = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir).checkpoint.folder
    assert folder is not None
    return (folder / "model.safetensors").resolve()


def marker(blob: Path) -> Path:
    return blob.parent.parent / integrity.MARKERS / blob.name


def damage(blob: Path) -> None:
    """Flip a bit of the last weight; size and header stay."""
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)


def test_corrupt_content_is_fetched_again_once(
    hub: MiniHub, blob: Path, repo_id: str, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(blob)
    hub.requests.clear()
    with caplog.at_level(logging.WARNING):
        assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    [said] = [record.getMessage() for record in caplog.records if "corrupt" in record.getMessage()]
    assert "model.safetensors" in said and repo_id in said and "fetched again" in said
    assert len([path for method, path, _, _, _ in hub.requests if method == "GET" and "/cdn/" in path]) == 1
    caplog.clear()
    hub.requests.clear()
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    assert not caplog.records and not [path for _, path, _, _, _ in hub.requests if "/cdn/" in path]


def test_a_cache_without_links_is_checked_against_the_hub(
    hub: MiniHub, blob: Path, repo_id: str, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As on systems without symbolic links, or where a link was replaced by a file."""
    [link] = Path(cache_dir).rglob("snapshots/*/model.safetensors")
    content = link.read_bytes()
    link.unlink()
    link.write_bytes(content)
    hub.requests.clear()
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    asked = [path for method, path, _, _, _ in hub.requests if method == "HEAD" and "model.safetensors" in path]
    assert len(asked) == 1 and not caplog.records
    hub.requests.clear()
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    assert not [path for method, path, _, _, _ in hub.requests if method == "HEAD" and "model.safetensors" in path]
    damage(link)
    with caplog.at_level(logging.WARNING):
        assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    assert "is corrupt; it is removed and fetched again" in caplog.text


def test_threads_replace_corrupt_content_once(
    hub: MiniHub, blob: Path, repo_id: str, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(blob)
    hub.requests.clear()
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(6) as pool:
        for sae in pool.map(lambda _: SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), range(6)):
            assert_same(sae, example())
    assert sum("corrupt" in record.getMessage() for record in caplog.records) == 1


def test_corrupt_content_is_an_error_offline(hub: MiniHub, blob: Path, repo_id: str, cache_dir: str) -> None:
    damage(blob)
    before = blob.read_bytes()
    for latents in (None, [1]):
        with pytest.raises(
            CheckpointError, match="does not have the hash that the Hub announces.*force_download=True"
        ):
            SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, local_files_only=True, latents=latents)
    assert blob.read_bytes() == before
    healed = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, force_download=True)
    assert_same(healed, example())


def test_a_small_file_is_checked_too(hub: MiniHub, blob: Path, repo_id: str, cache_dir: str) -> None:
    config = next(Path(cache_dir).rglob("config.json"))
    content = config.read_bytes()
    config.resolve().write_bytes(content.replace(b"resid_post.1", b"resid_post.2").replace(b'"d_in": 6', b'"d_in": 7'))
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    assert config.read_bytes() == content


def test_content_is_hashed_once(blob: Path, repo_id: str, cache_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert marker(blob).read_text() == f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
    hashed: list[str] = []
    hash_of = integrity._hash
    monkeypatch.setattr(integrity, "_hash", lambda path, wanted: hashed.append(path.name) or hash_of(path, wanted))
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert not hashed
    os.utime(blob, ns=(1, 1))
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert hashed == [blob.name]
    marker(blob).write_text("rubbish")
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert hashed == [blob.name] * 2
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    assert hashed == [blob.name] * 2


def test_a_cache_that_cannot_be_written_to(
    hub: MiniHub, blob: Path, repo_id: str, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker(blob).unlink()
    write = Path.write_text

    def refuse(self: Path, *args: object, **kwargs: object) -> int:
        if integrity.MARKERS in self.parts:
            raise PermissionError("read-only")
        return write(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", refuse)
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, local_files_only=True), example())
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())
    assert not marker(blob).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache(blob: Path, repo_id: str, cache_dir: str) -> None:
    marker(blob).unlink()
    folders = [Path(cache_dir), *(path for path in Path(cache_dir).rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, local_files_only=True), example())
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_client_can_scan_and_delete_its_cache(hub: MiniHub, blob: Path, repo_id: str, cache_dir: str) -> None:
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, latents=[1])
    cache = scan_cache_dir(cache_dir)
    assert not cache.warnings
    [repo] = cache.repos
    [revision] = repo.revisions
    names = {file.file_name for file in revision.files}
    assert repo.repo_id == repo_id and {"config.json", "model.safetensors"} <= names
    assert not any(integrity.MARKERS in str(file.blob_path) for file in revision.files)
    strategy = cache.delete_revisions(revision.commit_hash)
    assert strategy.expected_freed_size == repo.size_on_disk
    strategy.execute()
    assert not blob.exists() and not marker(blob).exists()
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir), example())


def test_deleting_one_of_two_revisions(hub: MiniHub, blob: Path, repo_id: str, cache_dir: str) -> None:
    old = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir).checkpoint.revision
    example("standard").push_to_hub(repo_id)
    SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    scan_cache_dir(cache_dir).delete_revisions(old).execute()
    assert not blob.exists()
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, local_files_only=True), example("standard"))
    assert_same(SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, revision=old), example())


def test_a_file_whose_name_is_no_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"anything")
    assert integrity.is_intact(tmp_path / "file")
