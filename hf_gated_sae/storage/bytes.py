"""The bytes of one file, local, remote or in memory: the source from which every tensor reader reads.

`safetensors` opens only local files. A file object of `fsspec` reads one range after another, where a few latents are
many ranges that one HTTP request can fetch, and does not map a local file into memory.
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
        name: name for messages.
        bytes_read: bytes read from it so far; mapped tensors are counted when they are mapped.
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
        """Return the whole file as a writable buffer that is never written back; a remote file is downloaded first."""

    def fetch(self) -> None:  # noqa: B027  # most sources have nothing to do
        """Download the whole file, because all of it is about to be read piece by piece."""

    def transposed(self, span: Range, rows: int, itemsize: int, name: str) -> ByteSource | None:
        """Return a local source whose content is the transpose of a matrix in this file.

        Only remote sources need one, to read columns; the others return None.

        Args:
            span: offset and length of the matrix.
            rows: number of rows of the stored matrix.
            itemsize: bytes of one value.
            name: name for messages.
        """
        return None

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of every range, requested together.

        Raises:
            CheckpointError: if a range is not inside the file.
        """
        for offset, length in ranges:
            self.require(offset, length)
        parts = self._read(ranges)
        self.bytes_read += sum(len(part) for part in parts)
        return parts

    def require(self, offset: int, length: int) -> None:
        """Raise unless a range is inside the file.

        Raises:
            CheckpointError: with the file's size.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.name} cannot be read: it has {self.size} bytes, but its header announces {length} bytes at "
                f"{offset}. Expected a complete file; fetch it again."
            )

    def stream(self) -> io.BufferedReader:
        """Return the file for readers that seek, such as `zipfile`."""
        return io.BufferedReader(_Stream(self), buffer_size=1 << 16)


class LocalBytes(ByteSource):
    """A local file, mapped privately: writing to a mapped tensor does not change the file.

    Args:
        path: the file.
        name: name for messages; the path by default.
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
            if len(part) != length:  # the file has been truncated meanwhile
                raise CheckpointError(f"{self.name} ends before byte {offset + length}; fetch it again.")
        return parts

    def map(self) -> mmap.mmap:
        """Return a new copy-on-write map of the file."""
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
    """A seekable stream that reads ranges of a source."""

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
