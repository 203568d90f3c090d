"""Read zip archives whose entries are tensors: npz and torch files."""

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
"""Highest ratio of unpacked to packed size of an entry; weights hardly compress, so more is a zip bomb."""
HIGHEST_TOTAL = 20
"""The same for a whole archive, whose entries may overlap."""
FLOOR = 1 << 24
"""Unpacked bytes that are always allowed, however small the archive."""


@contextmanager
def archive(source: ByteSource) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive through its source.

    Raises:
        CheckpointError: if it is not a zip archive, or a broken one.
    """
    try:
        with source.stream() as stream, zipfile.ZipFile(stream) as opened:
            _require_plausible(source, opened.infolist())
            yield opened
    except _BROKEN as error:
        own = _own_error(error)
        if own is not None:
            raise own from None
        raise _broken(source, str(error)) from error


_BROKEN = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, zlib.error, EOFError, OSError, RuntimeError),
    *(NotImplementedError, OverflowError, ValueError, MemoryError, IndexError),
)


def _own_error(error: BaseException | None) -> SAEError | None:
    """Return this package's error that caused one of zipfile's, such as a failed download; None if there is none."""
    while error is not None and not isinstance(error, SAEError):
        error = error.__cause__ or error.__context__
    return error


def _require_plausible(source: ByteSource, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse archives that no tensor library writes."""
    if len(entries) > MOST_ENTRIES:
        raise CheckpointError(f"{source.name} has {len(entries)} entries; expected a few tensors.")
    [(name, times)] = Counter(entry.filename for entry in entries).most_common(1) or [("", 0)]
    if times > 1:
        raise CheckpointError(f"{source.name} holds {name[:80]!r} {times} times; expected each entry once.")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise CheckpointError(
            f"{source.name} uses an unsupported compression; expected a deflated or uncompressed archive."
        )
    total = sum(entry.file_size for entry in entries)
    if total > HIGHEST_TOTAL * source.size + FLOOR:
        raise CheckpointError(
            f"{source.name} has {source.size} bytes, and its entries claim {total}; expected weights, which hardly "
            "compress."
        )


def stored_offsets(source: ByteSource, entries: Sequence[zipfile.ZipInfo]) -> list[int | None]:
    """Return the offset of each entry's content in the file, None for compressed ones; headers are read together.

    Raises:
        CheckpointError: if an entry's local header is broken.
    """
    plain = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    headers = source.read([(entry.header_offset, LOCAL_HEADER.size) for entry in plain])
    starts = {id(entry): _start(source, entry, header) for entry, header in zip(plain, headers, strict=True)}
    return [starts.get(id(entry)) for entry in entries]


def _start(source: ByteSource, entry: zipfile.ZipInfo, content: bytes) -> int:
    """Return the offset of an entry's content, from its local header."""
    header = LOCAL_HEADER.unpack(content)
    if header[0] != b"PK\x03\x04" or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise _broken(source, f"the entry {entry.filename[:80]!r} has no valid header")
    start: int = entry.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
    source.require(start, entry.file_size)
    return start


def unpacked(source: ByteSource, opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return the content of an entry.

    Raises:
        CheckpointError: if it is far larger than its compressed size, or not as long as announced.
    """
    if entry.file_size > HIGHEST_COMPRESSION * max(entry.compress_size, 1 << 16):
        raise CheckpointError(
            f"{source.name} holds {entry.filename[:80]!r} with {entry.file_size} bytes packed into "
            f"{entry.compress_size}; expected weights, which hardly compress."
        )
    with opened.open(entry) as stream:
        content = stream.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise _broken(source, f"the entry {entry.filename[:80]!r} is not as long as announced")
    return content


def _broken(source: ByteSource, why: str) -> CheckpointError:
    return CheckpointError(f"{source.name} cannot be read: {why}. Expected a complete zip archive; fetch it again.")
