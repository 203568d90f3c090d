"""Read the headers of ``.npz`` files, numpy's archives of arrays."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from ..errors import CheckpointError, shown
from .bytes import ByteSource, MemoryBytes
from .stored import MOST_AXES, StoredTensor
from .zipped import archive, stored_offsets, unpacked

HEADER = 4096
DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}

_NOT_AN_ARRAY = (
    *(ValueError, KeyError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError, OverflowError),
    *(IndexError, AttributeError, tokenize.TokenError),
)
"""Errors that numpy raises on invalid headers."""


def read_npz(source: ByteSource) -> dict[str, Any]:
    """Return the arrays of an npz file; compressed ones are unpacked into memory, others are read from the file.

    Raises:
        CheckpointError: if the archive is broken or an array is not made of numbers.
    """
    found: dict[str, Any] = {}
    with archive(source) as opened:
        entries = opened.infolist()
        starts = stored_offsets(source, entries)
        if None in starts:
            source.fetch()
        spans = [(start, min(HEADER, entry.file_size)) for entry, start in zip(entries, starts, strict=True)]
        headers = iter(source.read([(start, length) for start, length in spans if start is not None]))
        for entry, start in zip(entries, starts, strict=True):
            name = entry.filename.removesuffix(".npy")
            if name in found:
                raise CheckpointError(f"{source.name} holds {name[:80]} twice; expected each array once.")
            if start is not None:
                found[name] = _array(source, entry, name, start, next(headers))
                continue
            content = unpacked(source, opened, entry)
            held = MemoryBytes(content, f"{name[:80]} of {source.name}")
            found[name] = _array(held, entry, name, 0, content[:HEADER])
    return found


def _array(holder: ByteSource, entry: zipfile.ZipInfo, name: str, start: int, content: bytes) -> StoredTensor:
    """Read the header of one array.

    Args:
        holder: the source of its bytes.
        entry: the archive's entry.
        name: name of the array.
        start: offset of its first byte.
        content: its first bytes, at most `HEADER`.
    """
    stream = io.BytesIO(content)
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
        kind = DTYPES[np.dtype(dtype).str]
    except _NOT_AN_ARRAY as error:
        raise CheckpointError(
            f"{name[:80]} of {holder.name} is not an array of numbers ({str(error)[:120]}); expected float32 weights."
        ) from error
    possible = len(shape) <= MOST_AXES and min(shape, default=0) >= 0
    if not possible or stream.tell() + math.prod(shape) * kind.itemsize != entry.file_size:
        raise CheckpointError(
            f"{name[:80]} of {holder.name} claims shape {shown(list(shape))}, which does not fit its "
            f"{entry.file_size} bytes: the file is truncated or broken. Fetch it again."
        )
    stored = StoredTensor(holder, name, kind, shape[::-1] if fortran else shape, start + stream.tell())
    return stored.T if fortran and len(shape) == 2 else stored
