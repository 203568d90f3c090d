"""Zip archives whose entries are tensors: npz and torch files."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError
from .bytes import ByteSource

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
MOST_ENTRIES = 100_000
HIGHEST_COMPRESSION = 100
"""Weights hardly shrink at all; an entry that grows more than this while it is unpacked is a bomb."""


@contextmanager
def archive(source: ByteSource) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive through its source.

    Raises:
        CheckpointError: if it is no zip archive, or a broken one.
    """
    try:
        with source.stream() as stream, zipfile.ZipFile(stream) as opened:
            if len(opened.infolist()) > MOST_ENTRIES:
                raise CheckpointError(f"{source.name} has {len(opened.infolist())} entries; expected a few tensors.")
            yield opened
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, EOFError, OSError, RuntimeError) as error:
        raise _broken(source, str(error)) from error
    except (NotImplementedError, OverflowError, ValueError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(source, str(error)) from error


def stored_offset(source: ByteSource, entry: zipfile.ZipInfo) -> int | None:
    """Return where the bytes of an entry start in the file, or None if they are compressed.

    Raises:
        CheckpointError: if the entry's own header is broken.
    """
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    [content] = source.read([(entry.header_offset, LOCAL_HEADER.size)])
    header = LOCAL_HEADER.unpack(content)
    if header[0] != b"PK\x03\x04" or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise _broken(source, f"the entry {entry.filename!r} has no sound header")
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
            f"{source.name} holds {entry.filename!r} with {entry.file_size} bytes packed into {entry.compress_size}; "
            "expected weights, which hardly shrink."
        )
    with opened.open(entry) as stream:
        content = stream.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise _broken(source, f"the entry {entry.filename!r} is not as long as announced")
    return content


def _broken(source: ByteSource, why: str) -> CheckpointError:
    return CheckpointError(f"{source.name} cannot be read: {why}. Expected a complete zip archive; fetch it again.")
