"""Read columns of a remote matrix: fetch the matrix once and store its transpose locally.

A range request can read rows, but not columns. Where another library's layout stores the encoder as ``[d_in, d_sae]``,
one latent is a column, spread over the whole matrix. So that matrix alone is fetched, and its transpose is stored
beside the Hub's cache; later latents are rows of that local file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import MissingFileError
from ..storage import ByteSource, LocalBytes

_log = logging.getLogger(__name__)

SUFFIX = ".rows"
SMALLEST_CHUNK = 1 << 25
PASSES = 32
"""A matrix is written in at most this many passes over the file, each of which writes to every row."""

Fetch = Callable[[int, int, int], Iterator[bytes]]
"""From (offset, length, chunk length) to the bytes, in chunks of that length; the last may be shorter."""


def transposed_rows(
    folder: Path,
    key: str,
    span: tuple[int, int],
    rows: int,
    itemsize: int,
    name: str,
    fetch: Fetch,
    *,
    overwrite: bool = False,
) -> tuple[ByteSource, int]:
    """Return the transpose of a matrix as a local file, which is written if it does not exist.

    Args:
        folder: folder of the file; a temporary file is used if it cannot be written to.
        key: identifies the content of the remote file.
        span: offset and length of the matrix in the remote file.
        rows: number of rows of the stored matrix.
        itemsize: bytes of one value.
        name: name of the matrix in messages.
        fetch: fetches the bytes.
        overwrite: whether to write the file even if it exists.

    Returns:
        The local file, and the number of bytes fetched.
    """
    offset, length = span
    identity = hashlib.sha256(f"{key} {offset} {length} {rows} {itemsize}".encode()).hexdigest()
    stored = folder / f"{identity[:40]}{SUFFIX}"
    if not overwrite and stored.is_file() and stored.stat().st_size == length:
        return LocalBytes(stored, name), 0
    _log.warning(
        "%s has one column per latent, which a range request cannot read: all %.1f MB are fetched once and stored "
        "transposed at %s; later latents are read from there.",
        *(name, length / 1e6, stored),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f"{stored.name}.", dir=folder)
        os.close(descriptor)
    except OSError as error:
        _log.warning("%s cannot be written to (%s); the transposed matrix is not stored.", folder, error)
        return _TemporaryRows(length, name, lambda path: _write(path, span, rows, itemsize, fetch)), length
    try:
        _write(Path(partial), span, rows, itemsize, fetch)
        Path(partial).replace(stored)
    finally:
        Path(partial).unlink(missing_ok=True)
    return LocalBytes(stored, name), length


class _TemporaryRows(LocalBytes):
    """A temporary file, deleted with the object."""

    def __init__(self, length: int, name: str, write: Callable[[Path], None]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hf_gated_sae_")
        super().__init__(Path(self._folder.name) / "columns", name)
        write(self.path)


def _write(path: Path, span: tuple[int, int], rows: int, itemsize: int, fetch: Fetch) -> None:
    """Write the transpose, with only a few rows of the matrix in memory at a time.

    Raises:
        MissingFileError: if the disk has too little free space.
    """
    offset, length = span
    free = shutil.disk_usage(path.parent).free
    if free < length:  # writing to a mapped file on a full disk kills the process
        raise MissingFileError(
            f"{path.parent} has {free / 1e6:.1f} MB of free space, and {length / 1e6:.1f} MB are needed to store the "
            "transposed encoder: free some space, pass cache_dir=, or load the SAE without latents=."
        )
    row_bytes = length // rows
    several = max(1, max(SMALLEST_CHUNK, length // PASSES) // row_bytes)
    values = np.memmap(path, np.dtype(f"V{itemsize}"), "w+", shape=(row_bytes // itemsize, rows))
    first = 0
    for chunk in fetch(offset, length, several * row_bytes):
        stripe = np.frombuffer(chunk, values.dtype).reshape(-1, row_bytes // itemsize)
        values[:, first : first + len(stripe)] = stripe.T
        first += len(stripe)
    values.flush()
