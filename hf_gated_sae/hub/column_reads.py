"""Columns of a matrix in a file that is far away: fetched once, kept in rows.

A range request reaches rows. Where a foreign layout stores the encoder ``[d_in, d_sae]``, one latent is a column,
spread over the whole matrix; so the matrix is fetched, alone, and its transpose kept beside the Hub's cache. Later
latents are rows of that local file.
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
"""A matrix is written in at most so many passes over the file, each of which touches every row."""

Fetch = Callable[[int, int, int], Iterator[bytes]]
"""From (offset, length, chunk length) to the bytes, in chunks of that length but for the last."""


def turned_rows(
    folder: Path,
    key: str,
    place: tuple[int, int],
    rows: int,
    itemsize: int,
    name: str,
    fetch: Fetch,
    *,
    afresh: bool = False,
) -> tuple[ByteSource, int]:
    """Return the transpose of a matrix as a local file, written now unless it is there.

    Args:
        folder: where it is kept; a temporary file is used where that cannot be written to.
        key: identifies the content of the file that holds the matrix.
        place: offset and length of the matrix in it.
        rows: its number of rows as it is stored.
        itemsize: bytes of one value.
        name: what messages call it.
        fetch: gets the bytes.
        afresh: whether to write it even if it is there.

    Returns:
        The source, and how many bytes were fetched for it.
    """
    offset, length = place
    identity = hashlib.sha256(f"{key} {offset} {length} {rows} {itemsize}".encode()).hexdigest()
    kept = folder / f"{identity[:40]}{SUFFIX}"
    if not afresh and kept.is_file() and kept.stat().st_size == length:
        return LocalBytes(kept, name), 0
    _log.warning(
        "%s has one column per latent, so that a few latents are spread over all of it: its %.1f MB are fetched once "
        "and kept in rows at %s; later latents are read from there.",
        *(name, length / 1e6, kept),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f"{kept.name}.", dir=folder)
        os.close(descriptor)
    except OSError as error:
        _log.warning("%s cannot be written to (%s); the columns are not kept.", folder, error)
        return _Temporary(length, name, lambda path: _write(path, place, rows, itemsize, fetch)), length
    try:
        _write(Path(partial), place, rows, itemsize, fetch)
        Path(partial).replace(kept)
    finally:
        Path(partial).unlink(missing_ok=True)
    return LocalBytes(kept, name), length


class _Temporary(LocalBytes):
    """A file that is gone with the object."""

    def __init__(self, length: int, name: str, write: Callable[[Path], None]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hf_gated_sae_")
        super().__init__(Path(self._folder.name) / "columns", name)
        write(self.path)


def _write(path: Path, place: tuple[int, int], rows: int, itemsize: int, fetch: Fetch) -> None:
    """Write the transpose, a few of the matrix's rows at a time; only those are in memory.

    Raises:
        MissingFileError: if there is no room for it.
    """
    offset, length = place
    free = shutil.disk_usage(path.parent).free
    if free < length:  # a mapped file that finds no room ends the process
        raise MissingFileError(
            f"{path.parent} has room for {free / 1e6:.1f} MB, and {length / 1e6:.1f} MB are needed to keep the "
            "encoder in rows: make room, pass cache_dir=, or load the SAE without latents=."
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
