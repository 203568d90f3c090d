"""Read the headers of a tensor file of any supported kind."""

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
    ".bin": read_torch,
}
"""Reader of each kind of file, by suffix."""


LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE = b"\x80"
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number, as a pickle, at the start of torch files before torch 1.6 wrote zip archives."""
LFS_POINTER = (
    "is a git-lfs pointer, not the file itself: the repository was cloned without git-lfs. Run `git lfs pull` in it, "
    "or load it from the Hub by its id."
)


def read_content(source: ByteSource, file: str) -> Content:
    """Return the content of a tensor file; only the headers of tensors are read.

    Args:
        source: the file.
        file: its name, whose suffix determines the kind, one of `TENSOR_FILES`.

    Returns:
        Stored tensors (and, from a ``.pt`` file, plain values and dictionaries) by name.

    Raises:
        CheckpointError: if it is of another kind, broken, or contains more than tensors and plain values.
    """
    suffix = PurePosixPath(file).suffix
    if suffix not in TENSOR_FILES:
        raise CheckpointError(
            f"{source.name} is not a tensor file of a supported kind; expected one of {', '.join(TENSOR_FILES)}."
        )
    try:
        return TENSOR_FILES[suffix](source)
    except CheckpointError as error:
        if (why := _other_kind(source)) is None:
            raise
        raise CheckpointError(f"{source.name} {why}") from error


def _other_kind(source: ByteSource) -> str | None:
    """Return what an unreadable file is, as the end of a sentence; None if that is not known."""
    [start] = source.read([(0, min(source.size, 64))])
    if not start:
        return "cannot be read: it is empty. Expected a complete file; fetch it again."
    if start.startswith(LFS):
        return LFS_POINTER
    if start[:1] == _PICKLE and start[2:].startswith(_LEGACY):
        return (
            "is a torch file from before torch 1.6 (or saved with _use_new_zipfile_serialization=False), which cannot "
            "be read in part. Save it again: torch.save(torch.load(path, weights_only=True), path)."
        )
    if start[:1] == _PICKLE:
        return (
            "is a bare pickle, which is not opened, as it could run any code. If you trust it, save its tensors with "
            "safetensors.torch.save_file."
        )
    return None


def flat(content: Mapping[str, Any], where: str) -> dict[str, StoredTensor]:
    """Return the content of a file that has only named tensors.

    Raises:
        CheckpointError: naming an entry that is not a tensor.
    """
    for name, value in content.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{where} holds {shown(name)} = {shown(value, 60)}; expected named tensors only.")
    return dict(content)
