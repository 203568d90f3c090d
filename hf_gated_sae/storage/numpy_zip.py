"""Headers of ``.npz`` files, numpy's archives of arrays."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from ..errors import CheckpointError
from .bytes import ByteSource, MemoryBytes
from .stored import StoredTensor
from .zipped import archive, stored_offset, unpacked

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


def read_npz(source: ByteSource) -> dict[str, Any]:
    """Return the arrays of an npz file; those stored uncompressed are read in place, others are unpacked here.

    Raises:
        CheckpointError: if the archive is broken or an array is not made of numbers.
    """
    found: dict[str, Any] = {}
    with archive(source) as opened:
        for entry in opened.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in found:
                raise CheckpointError(f"{source.name} holds {name} twice; expected each array once.")
            found[name] = _array(source, opened, entry, name)
    return found


def _array(source: ByteSource, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> StoredTensor:
    """Read the header of one array."""
    start = stored_offset(source, entry)
    holder = source
    if start is None:
        holder, start = MemoryBytes(unpacked(source, opened, entry), f"{name} of {source.name}"), 0
    [content] = holder.read([(start, min(HEADER, entry.file_size))])
    stream = io.BytesIO(content)
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
        kind = DTYPES[np.dtype(dtype).str]
    except (ValueError, KeyError, SyntaxError, TypeError, EOFError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{name} of {source.name} is no array of numbers ({str(error)[:120]}); expected float32 weights."
        ) from error
    if stream.tell() + math.prod(shape) * kind.itemsize != entry.file_size or min(shape, default=0) < 0:
        raise CheckpointError(
            f"{name} of {source.name} claims shape {list(shape)}, which does not fit its {entry.file_size} bytes: the "
            "file is truncated or broken. Fetch it again."
        )
    stored = StoredTensor(holder, name, kind, shape[::-1] if fortran else shape, start + stream.tell())
    return stored.T if fortran and len(shape) == 2 else stored
