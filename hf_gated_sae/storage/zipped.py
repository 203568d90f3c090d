"""Zip archives whose entries are tensors: npz and torch files."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import CheckpointError, SAEError
from .bytes import ByteSource

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
MOST_ENTRIES = 100_000
HIGHEST_COMPRESSION = 100
"""Weights hardly shrink at all; an entry that grows more than this while it is unpacked is a bomb."""
HIGHEST_TOTAL = 20
"""The same for an archive as a whole, whose entries may lie on top of each other."""
FLOOR = 1 << 24
"""Unpacked bytes that are harmless whatever the archive's size."""


@contextmanager
def archive(source: ByteSource) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive through its source.

    Raises:
        CheckpointError: if it is no zip archive, or a broken one.
    """
    try:
        with source.stream() as stream, zipfile.ZipFile(stream) as opened:
            _require_plausible(source, opened.infolist())
            yield opened
    except _BROKEN as error:
        ours = _ours(error)
        if ours is not None:
            raise ours from None
        raise _broken(source, str(error)) from error


_BROKEN = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, zlib.error, EOFError, OSError, RuntimeError),
    *(NotImplementedError, OverflowError, ValueError, MemoryError, IndexError),
)


def _ours(error: BaseException | None) -> SAEError | None:
    """Return the error of ours behind one of zipfile's, which takes bytes that cannot be fetched for broken ones."""
    while error is not None and not isinstance(error, SAEError):
        error = error.__cause__ or error.__context__
    return error


def _require_plausible(source: ByteSource, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse archives that are not what a library for tensors writes."""
    if len(entries) > MOST_ENTRIES:
        raise CheckpointError(f"{source.name} has {len(entries)} entries; expected a few tensors.")
    [(name, times)] = Counter(entry.filename for entry in entries).most_common(1) or [("", 0)]
    if times > 1:
        raise CheckpointError(f"{source.name} holds {name[:80]!r} {times} times; expected each entry once.")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise CheckpointError(f"{source.name} is compressed in a way that is not read here; expected a usual archive.")
    total = sum(entry.file_size for entry in entries)
    if total > HIGHEST_TOTAL * source.size + FLOOR:
        raise CheckpointError(
            f"{source.name} has {source.size} bytes, and its entries claim {total}; expected weights, which hardly "
            "shrink."
        )


def stored_offsets(source: ByteSource, entries: Sequence[zipfile.ZipInfo]) -> list[int | None]:
    """Return where the bytes of entries start in the file, or None for those that are compressed; asked for at once.

    Raises:
        CheckpointError: if an entry's own header is broken.
    """
    plain = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    headers = source.read([(entry.header_offset, LOCAL_HEADER.size) for entry in plain])
    starts = {id(entry): _start(source, entry, header) for entry, header in zip(plain, headers, strict=True)}
    return [starts.get(id(entry)) for entry in entries]


def _start(source: ByteSource, entry: zipfile.ZipInfo, content: bytes) -> int:
    """Return where the bytes of an entry start, given its own header."""
    header = LOCAL_HEADER.unpack(content)
    if header[0] != b"PK\x03\x04" or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise _broken(source, f"the entry {entry.filename[:80]!r} has no sound header")
    start: int = entry.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
    source.require(start, entry.file_size)
    return start


def unpacked(source: ByteSource, opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return the content of an entry.

    Raises:
        CheckpointError: if it is out of proportion to its compressed size, or not as long as announced.
    """
    if entry.file_size > HIGHEST_COMPRESSION * max(entry.compress_size, 1 << 16):
        raise CheckpointError(
            f"{source.name} holds {entry.filename[:80]!r} with {entry.file_size} bytes packed into "
            f"{entry.compress_size}; expected weights, which hardly shrink."
        )
    with opened.open(entry) as stream:
        content = stream.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise _broken(source, f"the entry {entry.filename[:80]!r} is not as long as announced")
    return content


def _broken(source: ByteSource, why: str) -> CheckpointError:
    return CheckpointError(f"{source.name} cannot be read: {why}. Expected a complete zip archive; fetch it again.")
