"""Malicious files are refused with our own error: quickly, without running code, and in little memory."""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_gated_sae.errors import CheckpointError
from hf_gated_sae.hub import locate
from hf_gated_sae.storage import LocalBytes, StoredTensor, flat, read_content
from tests.support.hostile import (
    ARRAYS,
    CANARY,
    HEADERS,
    JSON_TEXTS,
    PICKLES,
    YAML_TEXTS,
    archive,
    described,
    doubled,
    npy,
    tensor,
    torch_file,
)

SECONDS = 5.0
MEGABYTES = 300

FILES = {
    **{f"{name}.pt": torch_file(content) for name, content in PICKLES.items()},
    **{f"{name}.npz": archive({"a.npy": content}) for name, content in ARRAYS.items()},
    **{f"{name}.safetensors": content for name, content in HEADERS.items()},
}
HARMLESS = {"memo of any size.pt", "frame without end.pt"}
"""Strange files that are harmless to read."""


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    CANARY.unlink(missing_ok=True)
    start, before = time.process_time(), _peak()
    yield
    seconds, more = time.process_time() - start, _peak() - before
    assert seconds < SECONDS and more < MEGABYTES, f"{seconds:.1f} s, {more:.0f} MB"
    assert not CANARY.exists(), "code of the file was run"


def _peak() -> float:
    """Return this process's peak memory in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def refused(content: bytes, name: str, folder: Path) -> str:
    """Return the message with which a file is refused."""
    path = folder / f"file{Path(name).suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        flat(read_content(LocalBytes(path), path.name), "file")
    assert len(str(raised.value)) < 1000
    assert len(list(folder.iterdir())) == 1
    path.unlink()
    return str(raised.value)


@pytest.mark.parametrize("name", sorted(FILES.keys() - HARMLESS))
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    refused(FILES[name], name, tmp_path)


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_strange_but_harmless_file_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{Path(name).suffix}"
    path.write_bytes(FILES[name])
    assert len(flat(read_content(LocalBytes(path), path.name), "file")) < 2


def zipped(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as opened:
        for name, content in entries:
            with pytest.warns() if name in opened.namelist() else _nothing():
                opened.writestr(name, content)
    return stream.getvalue()


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_bomb_of_zeros(tmp_path: Path) -> None:
    content = archive({"a.npy": npy(shape="(10000000,)", values=bytes(40_000_000))}, zipfile.ZIP_DEFLATED)
    assert "hardly compress" in refused(content, "x.npz", tmp_path)


def test_a_bomb_of_many_entries(tmp_path: Path) -> None:
    six_megabytes = npy(shape="(1500000,)", values=bytes(6_000_000))
    content = archive({f"{n}.npy": six_megabytes for n in range(12)}, zipfile.ZIP_DEFLATED)
    assert "its entries claim" in refused(content, "x.npz", tmp_path)


def test_a_compressed_byteorder_bomb(tmp_path: Path) -> None:
    stream = io.BytesIO(torch_file(described(tensor())))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("archive/byteorder", bytes(60_000_000))
    refused(stream.getvalue(), "x.pt", tmp_path)


def test_entries_of_the_same_name(tmp_path: Path) -> None:
    assert "2 times" in refused(zipped(("a.npy", npy()), ("a.npy", npy())), "x.npz", tmp_path)
    assert "twice" in refused(zipped(("a.npy", npy()), ("a", npy())), "x.npz", tmp_path)
    assert "2 times" in refused(
        zipped(("x/data.pkl", described(tensor())), ("x/data/0", bytes(24)), ("x/data/0", bytes(24))), "x.pt", tmp_path
    )
    both = zipped(("x/data.pkl", described(tensor())), ("y/data.pkl", described(tensor())))
    assert "2 data.pkl" in refused(both, "x.pt", tmp_path)


def test_names_that_leave_the_archive_are_only_names(tmp_path: Path) -> None:
    path = tmp_path / "in" / "x.npz"
    path.parent.mkdir()
    outside = str(tmp_path / "outside")
    path.write_bytes(zipped(("../../escaped.npy", npy()), (f"{outside}.npy", npy())))
    found = flat(read_content(LocalBytes(path), "x.npz"), "x")
    assert set(found) == {"../../escaped", outside}
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "x.npz"]


def test_an_entry_whose_own_header_leads_elsewhere(tmp_path: Path) -> None:
    content = bytearray(archive({"a.npy": npy()}))
    content[26:28] = struct.pack("<H", 60_000)  # length of the name in the local header
    refused(bytes(content), "x.npz", tmp_path)


def test_an_entry_that_claims_to_be_encrypted(tmp_path: Path) -> None:
    content = bytearray(archive({"a.npy": npy()}))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    refused(bytes(content), "x.npz", tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_take_any_memory(method: int, tmp_path: Path) -> None:
    assert "unsupported compression" in refused(archive({"a.npy": npy()}, method), "x.npz", tmp_path)


def test_a_compressed_array_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(archive({"a.npy": npy()}, zipfile.ZIP_DEFLATED))
    assert read_content(LocalBytes(path), "x.npz")["a"].shape == (2, 3)
    broken = bytearray(path.read_bytes())
    broken[60] ^= 0xFF
    path.unlink()
    refused(bytes(broken), "x.npz", tmp_path)


def test_a_sound_torch_file_is_read(tmp_path: Path) -> None:
    """The hostile files are made from a file that is sound."""
    path = tmp_path / "x.pt"
    path.write_bytes(torch_file(described(tensor())))
    assert torch.equal(read_content(LocalBytes(path), "x.pt")["a"].read(), torch.zeros(2, 3))
    assert torch.load(path, weights_only=True)["a"].shape == (2, 3)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    content = {"state": module.state_dict(), "k": 3, "lr": 1e-3, "names": ["a", "b"], "on": True, "none": None}
    content |= {1: "one", "shape": (2, 3), "dtype": torch.bfloat16, "device": torch.device("cpu"), "large": 2**80}
    torch.save(content, tmp_path / "x.pt")
    found = read_content(LocalBytes(tmp_path / "x.pt"), "x.pt")
    assert {name: found[name] for name in ("k", "lr", "names", "on", "none", "1", "shape", "large")} == {
        "k": 3, "lr": 1e-3, "names": ["a", "b"], "on": True, "none": None, "1": "one", "shape": (2, 3), "large": 2**80
    }  # fmt: skip
    assert found["dtype"] == "bfloat16" and found["device"] == "cpu"
    assert all(torch.equal(found["state"][name].read(), value) for name, value in module.state_dict().items())


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((50, 40), np.float32))
    stored = read_content(LocalBytes(tmp_path / "x.npz"), "x.npz")["a"]
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:1000])
    for read in (stored.read, stored.small, lambda: stored.rows([49]), lambda: stored.T.rows([39])):
        with pytest.raises(CheckpointError, match="(?i)fetch it again"):
            read()


@pytest.mark.parametrize("shape", [(2**62, 2**62, 0), (-1, 4), (1,) * 20, (2**70,)])
def test_a_shape_that_no_file_can_hold(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(64))
    with pytest.raises(CheckpointError, match="expected"):
        StoredTensor(LocalBytes(tmp_path / "x"), "a", torch.float32, shape, 0)


@pytest.mark.parametrize(
    "kind, name", [*(("json", name) for name in JSON_TEXTS), *(("yaml", name) for name in YAML_TEXTS)]
)
def test_a_hostile_description(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes((JSON_TEXTS if kind == "json" else YAML_TEXTS)[name])
    location = locate(str(tmp_path))
    try:
        found = location.read_json("config") if kind == "json" else location.read_yaml("config")
    except CheckpointError as error:
        assert len(str(error)) < 1000
    else:
        assert isinstance(found, dict)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_description_of_any_length(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"{}" + b" " * (1 << 23))
    location = locate(str(tmp_path))
    with pytest.raises(CheckpointError, match="expected at most"):
        location.read_json("config") if kind == "json" else location.read_yaml("config")


def test_the_bombs_are_bombs() -> None:
    assert len(doubled(b")")) < 400
