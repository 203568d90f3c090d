"""Headers of ``.pt`` files, without running what they hold.

A torch file is a zip archive: ``data.pkl``, a pickle that describes nested containers of tensors, and one uncompressed
entry per storage. The pickle is read by an unpickler that knows tensors, containers and plain values and nothing else:
no name in it is ever imported, so no code of it can run.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError
from .bytes import ByteSource
from .stored import StoredTensor
from .zipped import archive, stored_offset

LARGEST_PICKLE = 64 * 1024 * 1024
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    """Where one storage lies."""

    dtype: torch.dtype
    offset: int
    length: int


def read_torch(source: ByteSource) -> dict[str, Any]:
    """Return what a torch file holds: stored tensors, plain values, dictionaries of such.

    Raises:
        CheckpointError: if it is no torch zip archive, broken, or not a dictionary.
    """
    with archive(source) as opened:
        entries = {entry.filename: entry for entry in opened.infolist()}
        pickles = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{source.name} is no torch file: it holds {len(pickles)} data.pkl; expected one, as "
                "torch.save writes."
            )
        folder = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > LARGEST_PICKLE or stored_offset(source, entries[pickles[0]]) is None:
            raise CheckpointError(f"The description in {source.name} is too large or compressed; expected tensors.")
        byteorder = entries.get(f"{folder}byteorder")
        if byteorder is not None and opened.read(byteorder) != b"little":
            raise CheckpointError(f"{source.name} was written on a big-endian machine; save it again on another.")
        pickled = opened.read(pickles[0])
        try:
            _require_harmless(pickled)
            content = _Reader(pickled, source, entries, folder).load()
        except CheckpointError:
            raise
        except Exception as error:  # a broken pickle may fail in any way
            raise CheckpointError(
                f"{source.name} cannot be read without running code from it ({str(error)[:160] or error!r}); expected "
                "tensors in dictionaries, as torch.save(sae.state_dict()) writes."
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.name} holds a {type(content).__name__}; expected a dictionary of tensors.")
    return _named(content)


def _named(content: dict[str, Any], depth: int = 2) -> dict[str, Any]:
    """Give the tensors the names under which they are stored, in dictionaries within dictionaries, too."""
    named = {}
    for key, value in content.items():
        if isinstance(value, StoredTensor):
            value = replace(value, name=str(key))
        elif isinstance(value, dict) and depth > 1:
            value = _named(value, depth - 1)
        named[str(key)] = value
    return named


def _require_harmless(pickled: bytes) -> None:
    """Refuse memo numbers that would make the unpickler allocate a table of any size."""
    for code, argument, _ in pickletools.genops(pickled):
        if "PUT" in code.name and argument is not None and int(argument) > len(pickled):
            raise pickle.UnpicklingError(f"{code.name} {argument} in {len(pickled)} bytes")


class _Reader(pickle.Unpickler):
    """Reads containers, plain values and tensors; any other name is an error."""

    def __init__(self, content: bytes, source: ByteSource, entries: dict[str, zipfile.ZipInfo], folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._source = source
        self._entries = entries
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; nothing is imported."""
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch", "device"):
            return str
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return str(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Find the entry of a storage."""
        kind, dtype, key, _, count = pid
        entry = self._entries.get(f"{self._folder}data/{key}")
        if kind != "storage" or not isinstance(dtype, torch.dtype) or entry is None or type(count) is not int:
            raise pickle.UnpicklingError(f"it refers to an unknown storage {str(pid)[:80]}")
        offset = stored_offset(self._source, entry)
        if offset is None or count * dtype.itemsize != entry.file_size:
            raise CheckpointError(
                f"A storage of {self._source.name} has {entry.file_size} bytes where {count} values of {dtype} are "
                "announced, or is compressed: the file is broken. Fetch it again."
            )
        return _Storage(dtype, offset, count)

    def _tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        """Describe one tensor."""
        sides, steps = tuple(shape), tuple(strides)
        whole = all(type(number) is int and number >= 0 for number in (offset, *sides, *steps))
        if not whole or len(sides) != len(steps) or offset + math.prod(sides) > storage.length:
            raise CheckpointError(f"A tensor of {self._source.name} lies outside its storage: the file is broken.")
        start = storage.offset + offset * storage.dtype.itemsize
        if _is_dense(sides, steps):
            return StoredTensor(self._source, "a tensor", storage.dtype, sides, start)
        if len(sides) == 2 and _is_dense(sides[::-1], steps[::-1]):
            return StoredTensor(self._source, "a tensor", storage.dtype, sides[::-1], start, transposed=True)
        raise CheckpointError(
            f"{self._source.name} holds a tensor of shape {list(sides)} with strides {list(steps)}; expected one "
            "whose values lie side by side: save it again with .contiguous()."
        )


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether values lie side by side, the last axis fastest."""
    step = 1
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and stride != step:
            return False
        step *= side
    return True
