"""Partial reads equal what the format's own library reads from the whole file."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_gated_sae.errors import CheckpointError
from hf_gated_sae.storage import LocalBytes, StoredTensor, read_content

MATRIX = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def written(folder: Path, kind: str) -> Path:
    path = folder / f"file{kind.partition('-')[0]}"
    match kind:
        case ".safetensors":
            save_file({"a": MATRIX, "h": MATRIX.bfloat16()}, path)
        case ".npz":
            np.savez(path, a=MATRIX.numpy(), fortran=np.asfortranarray(MATRIX.numpy()))
        case ".npz-compressed":
            np.savez_compressed(path, a=MATRIX.numpy())
        case ".pt":
            nested = collections.OrderedDict(z=MATRIX)
            torch.save({"a": torch.nn.Parameter(MATRIX), "t": MATRIX.T, "inner": nested, "k": 3, "act": "TopK"}, path)
    return path


KINDS = [".safetensors", ".npz", ".npz-compressed", ".pt"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_rows_and_columns(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    a = read_content(LocalBytes(path), path.name)["a"]
    assert isinstance(a, StoredTensor) and a.shape == (7, 5) and a.T.shape == (5, 7)
    assert torch.equal(a.read(), MATRIX) and torch.equal(a.small(), MATRIX) and torch.equal(a.T.read(), MATRIX.T)
    assert torch.equal(a.rows([3, 0, 3]), MATRIX[[3, 0, 3]])
    assert torch.equal(a.T.rows([4, 1]), MATRIX.T[[4, 1]]) and a.T.rows([1]).is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_writing_into_what_was_read_never_reaches_the_file(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    before = path.read_bytes()
    read_content(LocalBytes(path), path.name)["a"].read().zero_()
    assert path.read_bytes() == before
    assert torch.equal(read_content(LocalBytes(path), path.name)["a"].read(), MATRIX)


def test_a_torch_file_holds_containers_and_plain_values(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt")
    content = read_content(LocalBytes(path), path.name)
    assert content["k"] == 3 and content["act"] == "TopK"
    assert torch.equal(content["inner"]["z"].read(), MATRIX) and torch.equal(content["t"].read(), MATRIX.T)


def test_arrays_in_columns(tmp_path: Path) -> None:
    path = written(tmp_path, ".npz")
    assert torch.equal(read_content(LocalBytes(path), path.name)["fortran"].read(), MATRIX)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "boom",))  # type: ignore[return-value]

    torch.save({"a": Bomb()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="without running code"):
        read_content(LocalBytes(tmp_path / "file.pt"), "file.pt")
    assert not (tmp_path / "boom").exists()


def test_another_kind_of_file() -> None:
    with pytest.raises(CheckpointError, match="expected one of .safetensors, .npz, .pt, .pth"):
        read_content(LocalBytes(Path("x.gguf")), "x.gguf")
