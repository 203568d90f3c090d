"""Headers of tensor files, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ..errors import CheckpointError, shown
from .bytes import ByteSource
from .numpy_zip import read_npz
from .safetensors_file import read_safetensors
from .stored import StoredTensor
from .torch_zip import read_torch

Content = dict[str, Any]
"""Stored tensors and plain values by name; for a ``.pt`` file possibly nested."""

TENSOR_FILES: Mapping[str, Callable[[ByteSource], Content]] = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pt": read_torch,
    ".pth": read_torch,
}
"""Reader of each kind of file, by suffix."""


def read_content(source: ByteSource, file: str) -> Content:
    """Return what a tensor file holds; of the tensors only the headers are read.

    Args:
        source: its bytes.
        file: its name, whose suffix tells the kind, one of `TENSOR_FILES`.

    Returns:
        Stored tensors (and, from a ``.pt`` file, plain values and dictionaries) by name.

    Raises:
        CheckpointError: if it is of another kind, broken, or holds more than tensors and plain values.
    """
    suffix = PurePosixPath(file).suffix
    if suffix not in TENSOR_FILES:
        raise CheckpointError(
            f"{source.name} is no tensor file that is read here; expected one of {', '.join(TENSOR_FILES)}."
        )
    return TENSOR_FILES[suffix](source)


def flat(content: Mapping[str, Any], where: str) -> dict[str, StoredTensor]:
    """Return a content that is nothing but named tensors.

    Raises:
        CheckpointError: naming an entry that is something else.
    """
    for name, value in content.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{where} holds {shown(name)} = {shown(value, 60)}; expected named tensors only.")
    return dict(content)
