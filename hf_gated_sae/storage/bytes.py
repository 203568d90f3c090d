"""The bytes of one file, wherever it lies: one source for disk and HTTP, on which every tensor reader is built.

`safetensors` opens files on disk alone. A file object of `fsspec` reads one range after the other, where the rows of a
few latents are many ranges that one HTTP request brings, and does not map a local file into memory.
"""

from __future__ import annotations

import io
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

Range = tuple[int, int]
"""Offset and length."""


class ByteSource(ABC):
    """A file of known size that can be read in part.

    Attributes:
        name: what messages call it.
        bytes_read: bytes taken from it so far; those of mapped tensors are counted when they are mapped.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes_read = 0

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of the file in bytes."""

    @abstractmethod
    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of every range; the ranges lie inside the file."""

    @abstractmethod
    def map(self) -> Any:
        """Return the whole file as a writable buffer that never reaches the disk, fetched first if need be."""

    def fetch(self) -> None:  # noqa: B027  # most sources have nothing to do
        """Get the whole file, because all of it is about to be read piece by piece."""

    def turned(self, place: Range, rows: int, itemsize: int, name: str) -> ByteSource | None:
        """Return a local source that holds the transpose of a matrix of this file, from its first byte on.

        Columns of a file that is far away are not within reach; of a local one they are, and the answer is None.

        Args:
            place: where the matrix lies.
            rows: its number of rows as it is stored.
            itemsize: bytes of one value.
            name: what messages call it.
        """
        return None

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of every range, asked for together.

        Raises:
            CheckpointError: if a range lies outside the file.
        """
        for offset, length in ranges:
            self.require(offset, length)
        parts = self._read(ranges)
        self.bytes_read += sum(len(part) for part in parts)
        return parts

    def require(self, offset: int, length: int) -> None:
        """Raise unless the file is long enough for a range.

        Raises:
            CheckpointError: saying how long it is.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.name} cannot be read: it has {self.size} bytes, but its header speaks of {length} bytes at "
                f"{offset}. Expected a complete file; fetch it again."
            )

    def stream(self) -> io.BufferedReader:
        """Return the file for readers that seek, such as `zipfile`."""
        return io.BufferedReader(_Stream(self), buffer_size=1 << 16)


class LocalBytes(ByteSource):
    """A file on this machine, mapped privately: what is written into a mapped tensor never reaches the file.

    Args:
        path: the file.
        name: what messages call it; the path by default.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(name or str(path))
        self.path = path

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self.path.stat().st_size

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        with self.path.open("rb") as file:
            parts = []
            for offset, length in ranges:
                file.seek(offset)
                parts.append(file.read(length))
        for (offset, length), part in zip(ranges, parts, strict=True):
            if len(part) != length:  # it has shrunk since
                raise CheckpointError(f"{self.name} ends before byte {offset + length}; fetch it again.")
        return parts

    def map(self) -> mmap.mmap:
        """Return the file's pages, copied when written to; a map of its own each time."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class MemoryBytes(ByteSource):
    """Bytes in memory, such as the unpacked content of a compressed entry."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(name)
        self._content = bytearray(content)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self._content)

    def _read(self, ranges: Sequence[Range]) -> list[bytes]:
        return [bytes(self._content[offset : offset + length]) for offset, length in ranges]

    def map(self) -> bytearray:
        """Return the content."""
        return self._content


class _Stream(io.RawIOBase):
    """Seeking and reading on top of ranges."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise OSError("negative seek position")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._source.size - self._position))
        if length:
            [buffer[:length]] = self._source.read([(self._position, length)])
            self._position += length
        return length
