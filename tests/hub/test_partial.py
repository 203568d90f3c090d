"""A few latents of a large SAE on the Hub cost a few requests and their own bytes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import MissingFileError
from hf_gated_sae.hub import integrity
from hf_gated_sae.hub.column_reads import SUFFIX
from tests.support.example_saes import example
from tests.support.mini_hub import MiniHub

LATENTS = [4001, 7, 1234, 8]
OVERHEAD = 64 * 1024


@pytest.fixture(scope="module")
def large() -> SAEModel:
    """An SAE of 31 MB."""
    return example("gated", site="resid_post.1", d_in=768, d_sae=5000)


@pytest.fixture
def native(hub: MiniHub, repo_id: str, large: SAEModel) -> str:
    large.push_to_hub(repo_id)
    hub.requests.clear()
    return repo_id


def weights_requests(hub: MiniHub) -> list[tuple[str, int, str | None]]:
    """Return method, status and range of the requests for weights, and forget them."""
    found = [
        (method, status, span)
        for method, path, status, span, _ in hub.requests
        if "safetensors" in path or ".npz" in path
    ]
    hub.requests.clear()
    return found


def sent(requests: list[tuple[str, int, str | None]], size: int) -> int:
    """Return how many bytes the Hub was asked to send."""
    total = 0
    for method, status, span in requests:
        if method == "GET" and status in (200, 206):
            parts = (
                [part.split("-") for part in span.removeprefix("bytes=").split(",")] if status == 206 and span else []
            )
            total += sum(int(end) + 1 - int(start) for start, end in parts) if parts else size
    return total


def assert_rows(some: SAEModel, full: SAEModel, latents: list[int]) -> None:
    for name, tensor in some.state_dict().items():
        whole = full.state_dict()[name]
        assert torch.equal(tensor, whole if name == "b_dec" else whole[latents]), name


def nbytes(sae: SAEModel) -> int:
    return sum(tensor.nbytes for tensor in sae.state_dict().values())


def test_our_own_layout_costs_its_rows(hub: MiniHub, native: str, large: SAEModel, cache_dir: str) -> None:
    some = SAEModel.from_pretrained(native, cache_dir=cache_dir, latents=LATENTS)
    assert_rows(some, large, LATENTS)
    requests = weights_requests(hub)
    gets = [span for method, _, span in requests if method == "GET"]
    assert len(gets) <= 1 + len(large.state_dict())
    assert sent(requests, nbytes(large)) <= nbytes(some) + OVERHEAD
    assert nbytes(some) <= some.checkpoint.bytes_read <= nbytes(some) + OVERHEAD
    assert not list(Path(cache_dir).rglob("*.safetensors")), "the file was fetched whole"
    again = SAEModel.from_pretrained(native, cache_dir=cache_dir, latents=[0])
    assert_rows(again, large, [0])


def test_a_cached_file_is_read_in_place(hub: MiniHub, native: str, large: SAEModel, cache_dir: str) -> None:
    full = SAEModel.from_pretrained(native, cache_dir=cache_dir)
    assert full.checkpoint.bytes_read >= nbytes(full)
    hub.requests.clear()
    for offline in (False, True):
        some = SAEModel.from_pretrained(native, cache_dir=cache_dir, latents=LATENTS, local_files_only=offline)
        assert_rows(some, large, LATENTS)
        assert some.checkpoint.bytes_read <= nbytes(some) + OVERHEAD
    assert not weights_requests(hub)


@pytest.mark.parametrize("kind, most", [("onerange", 60), ("merge", 10)])
def test_servers_that_do_not_support_several_ranges(
    kind: str, most: int, hub: MiniHub, native: str, large: SAEModel, cache_dir: str
) -> None:
    hub.fail("GET /cdn/", kind, times=-1)
    assert_rows(SAEModel.from_pretrained(native, cache_dir=cache_dir, latents=LATENTS), large, LATENTS)
    requests = weights_requests(hub)
    assert len(requests) <= most
    assert not list(Path(cache_dir).rglob("*.safetensors"))


def test_servers_that_do_not_support_ranges(hub: MiniHub, native: str, large: SAEModel, cache_dir: str) -> None:
    hub.fail("GET /cdn/", "norange", times=-1)
    assert_rows(SAEModel.from_pretrained(native, cache_dir=cache_dir, latents=LATENTS), large, LATENTS)
    assert len([method for method, _, _ in weights_requests(hub) if method == "GET"]) <= 4
    assert len(list(Path(cache_dir).rglob("*.safetensors"))) == 1


# ------------------------------------------------------------------ one column per latent

ADDRESS = "layer_1/width_16k/average_l0_71"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Gemma Scope's tensors, 26 MB: the encoder has one column per latent."""
    values = np.random.default_rng(0)
    shapes = {"W_enc": (640, 5000), "W_dec": (5000, 640), "b_enc": (5000,), "b_dec": (640,), "threshold": (5000,)}
    return {name: values.random(shape, np.float32) for name, shape in shapes.items()}


def scope(hub: MiniHub, name: str, arrays: dict[str, Any], folder: Path, *, compressed: bool = False) -> str:
    """Publish in Gemma Scope's layout, under a name that no other test uses."""
    folder.mkdir()
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **arrays)
    repo = f"{name}/gemma-scope-2b-pt-res"
    hub.seed(repo, {f"{ADDRESS}/params.npz": (folder / "params.npz").read_bytes()})
    hub.requests.clear()
    return repo


def assert_columns(some: SAEModel, arrays: dict[str, Any], latents: list[int]) -> None:
    assert np.array_equal(some.W_enc_T.detach().numpy(), arrays["W_enc"].T[latents])
    assert np.array_equal(some.W_dec.detach().numpy(), arrays["W_dec"][latents])
    assert np.array_equal(some.threshold.detach().numpy(), arrays["threshold"][latents])
    assert np.array_equal(some.b_dec.detach().numpy(), arrays["b_dec"])


def test_columns_are_fetched_once(
    hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    repo = scope(hub, "columns", arrays, tmp_path / "npz")
    matrix = arrays["W_enc"].nbytes
    with caplog.at_level(logging.INFO, "hf_gated_sae"):
        some = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert_columns(some, arrays, LATENTS)
    [said] = [record.getMessage() for record in caplog.records if "W_enc" in record.getMessage()]
    assert "12.8 MB" in said and SUFFIX in said
    requests = weights_requests(hub)
    long = [span for method, _, span in requests if span and sent([(method, 206, span)], 0) > OVERHEAD]
    assert len(long) == 1 and sent([("GET", 206, long[0])], 0) == matrix
    assert sent(requests, 0) < matrix + 4 * OVERHEAD
    assert matrix < some.checkpoint.bytes_read < matrix + 4 * OVERHEAD
    [kept] = Path(cache_dir).rglob(f"*{SUFFIX}")
    assert kept.parent.name == integrity.MARKERS and kept.stat().st_size == matrix
    caplog.clear()
    other = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=[99, 4999])
    assert_columns(other, arrays, [99, 4999])
    assert sent(weights_requests(hub), 0) < 4 * OVERHEAD and not caplog.records
    assert other.checkpoint.bytes_read < 4 * OVERHEAD
    assert list(kept.parent.iterdir()) == [kept]
    assert not list(Path(cache_dir).rglob("*.npz")), "the file was fetched whole"


def test_a_broken_cache_of_columns_is_written_again(
    hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    repo = scope(hub, "shortened", arrays, tmp_path / "npz")
    SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=[1])
    [kept] = Path(cache_dir).rglob(f"*{SUFFIX}")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert_columns(SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS), arrays, LATENTS)
    kept.write_bytes(bytes(kept.stat().st_size))
    forced = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS, force_download=True)
    assert_columns(forced, arrays, LATENTS)


def test_no_room_for_columns(
    hub: MiniHub, cache_dir: str, arrays: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    repo = scope(hub, "no-room", arrays, tmp_path / "npz")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MissingFileError, match="has 0.0 MB of free space, and .* MB are needed"):
        SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert not list(Path(cache_dir).rglob(f"*{SUFFIX}*"))


@pytest.mark.parametrize(
    "kind, times", [("drop", 1), ("drop", 2), ("truncate", 1), ("norange", -1), ("wrongrange", -1)]
)
def test_columns_from_a_bad_server(
    kind: str, times: int, hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = scope(hub, f"bad-{kind}-{times}".replace("--", "-all"), arrays, tmp_path / "npz")
    # Load once before the fault: reading the header is not tested here.
    SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=[1])
    for kept in Path(cache_dir).rglob(f"*{SUFFIX}"):
        kept.unlink()
    hub.fail("GET /cdn/", kind, times=times, after=300_000)
    some = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert_columns(some, arrays, LATENTS)
    assert not list(Path(cache_dir).rglob(f"*{SUFFIX}.*")), "a partial file was left"


def test_columns_with_a_connection_that_always_breaks(
    hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = scope(hub, "never", arrays, tmp_path / "npz")
    hub.fail("GET /cdn/", "drop", times=-1, after=0)
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert not list(Path(cache_dir).rglob(f"*{SUFFIX}*"))


def test_columns_where_nothing_can_be_cached(
    hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str, monkeypatch: Any
) -> None:
    repo = scope(hub, "full-disk", arrays, tmp_path / "npz")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    some = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert_columns(some, arrays, LATENTS)
    assert not list(Path(cache_dir).rglob(f"*{SUFFIX}"))


def test_a_compressed_archive_is_fetched_whole(
    hub: MiniHub, arrays: dict[str, Any], tmp_path: Path, cache_dir: str
) -> None:
    repo = scope(hub, "compressed", arrays, tmp_path / "npz", compressed=True)
    some = SAEModel.from_pretrained(repo, ADDRESS, cache_dir=cache_dir, latents=LATENTS)
    assert_columns(some, arrays, LATENTS)
    assert len([method for method, _, _ in weights_requests(hub) if method == "GET"]) <= 5
    assert len(list(Path(cache_dir).rglob("*.npz"))) == 1
