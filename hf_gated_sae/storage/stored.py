"""A tensor in a file: its header is known, its values are read on request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from .bytes import ByteSource, Range

LARGEST_GAP = 4096
"""Rows that are at most this many bytes apart are read as one range."""


MOST_AXES = 8
MOST_VALUES = 2**60
"""More values than any file has; the only bound on a shape in which one side is 0."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """The location, dtype and shape of one tensor in a file; its values are stored row by row.

    Attributes:
        source: the file.
        name: the tensor's name in the file.
        dtype: type of the stored values.
        stored_shape: shape in the file.
        offset: position of the first byte.
        transposed: whether this is the transpose of the stored matrix.
    """

    source: ByteSource
    name: str
    dtype: torch.dtype
    stored_shape: tuple[int, ...]
    offset: int
    transposed: bool = False

    def __post_init__(self) -> None:
        """Refuse an impossible shape, and a tensor that ends after the file.

        Raises:
            CheckpointError: naming the tensor.
        """
        sides = self.stored_shape
        if len(sides) > MOST_AXES or any(side < 0 for side in sides):
            raise CheckpointError(
                f"{self} has shape {shown(list(sides))}; expected at most {MOST_AXES} axes, none negative."
            )
        if math.prod(max(side, 1) for side in sides) > MOST_VALUES:
            raise CheckpointError(f"{self} has shape {shown(list(sides))}; expected one that fits into a file.")
        self.source.require(self.offset, self.nbytes)

    def __str__(self) -> str:
        """Return the name for messages."""
        return f"{self.name[:80]} of {self.source.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values that are read."""
        return self.stored_shape[::-1] if self.transposed else self.stored_shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.stored_shape)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.stored_shape) * self.dtype.itemsize

    @property
    def T(self) -> StoredTensor:
        """The transposed matrix; nothing is read or copied.

        Raises:
            CheckpointError: if this is not a matrix.
        """
        if self.ndim != 2:
            raise CheckpointError(f"{self} has shape {list(self.shape)}; expected a matrix.")
        return replace(self, transposed=not self.transposed)

    def read(self) -> Tensor:
        """Return the values as a private view of the mapped file; a remote file is downloaded first.

        Returns:
            A tensor of `shape`; writing to it does not change the file. A transposed one is a strided view.
        """
        return self._oriented(self._mapped())

    def small(self) -> Tensor:
        """Return a copy of the values without fetching the whole file; for scalars and short vectors."""
        [content] = self.source.read([(self.offset, self.nbytes)])
        return self._oriented(_tensor(bytearray(content), self.dtype, self.stored_shape))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return some rows of the first axis; where rows are contiguous in the file, only those are read.

        Args:
            indices: row numbers, in range.

        Returns:
            ``[len(indices), ...]``, a copy.
        """
        wanted = list(indices)
        if self.transposed:
            span, (stored_rows, stored_columns) = (self.offset, self.nbytes), self.stored_shape
            transposed = self.source.transposed(span, stored_rows, self.dtype.itemsize, str(self))
            if transposed is not None:
                shape = (stored_columns, stored_rows)
                rows = StoredTensor(transposed, self.name, self.dtype, shape, 0).rows(wanted)
                self.source.bytes_read += transposed.bytes_read
                return rows
            columns = self._mapped()[:, wanted]
            self.source.bytes_read += columns.nbytes - self.nbytes  # only the columns count, not the whole map
            return columns.T.contiguous()
        stride = math.prod(self.stored_shape[1:]) * self.dtype.itemsize
        runs = _runs(sorted(set(wanted)), stride)
        contents = self.source.read([(self.offset + first * stride, count * stride) for first, count in runs])
        where = {}
        for (first, count), content in zip(runs, contents, strict=True):
            for row in range(count):
                where[first + row] = content[row * stride : (row + 1) * stride]
        joined = bytearray(b"".join(where[index] for index in wanted))
        return _tensor(joined, self.dtype, (len(wanted), *self.stored_shape[1:]))

    def _mapped(self) -> Tensor:
        """Return the stored values as a view of the mapped file."""
        if not self.nbytes:
            return torch.empty(self.stored_shape, dtype=self.dtype)
        self.source.require(self.offset, self.nbytes)  # again: the file may have shrunk since its header was read
        self.source.bytes_read += self.nbytes
        return _tensor(self.source.map(), self.dtype, self.stored_shape, self.offset)

    def _oriented(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor


def _tensor(buffer: object, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Return a tensor over a writable buffer; the tensor keeps the buffer alive."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)


def _runs(rows: list[int], stride: int) -> list[Range]:
    """Join rows that are close together into runs of (first, count).

    >>> _runs([1, 2, 5, 100], stride=1000)
    [(1, 5), (100, 1)]
    """
    runs: list[Range] = []
    for row in rows:
        if runs and (row - sum(runs[-1])) * stride <= LARGEST_GAP:
            first = runs[-1][0]
            runs[-1] = (first, row - first + 1)
        else:
            runs.append((row, 1))
    return runs
