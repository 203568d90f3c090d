"""Read the headers of ``.pt`` files without running code from them.

A torch file is a zip archive: ``data.pkl``, a pickle that describes nested containers of tensors, and one uncompressed
entry per storage. The pickle is read by an unpickler that accepts only tensors, containers and plain values. It never
imports a name, so no code can run. It is a subclass of Python's unpickler, not C's, which cannot be made to refuse
inputs that are small but expensive, such as deeply nested tuples as keys, or that replace an object's state.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CheckpointError, shown
from ..upstream.pickle_private import Unpickler
from .bytes import ByteSource
from .stored import MOST_AXES, StoredTensor
from .zipped import archive, stored_offsets, unpacked

LARGEST_PICKLE = 4 * 1024 * 1024
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

KEYS = frozenset({str, int, float, bool, bytes, type(None)})
"""Accepted types of a dictionary's keys; the hash of a nested tuple can take unlimited time or overflow the stack."""


@dataclass(frozen=True)
class _Storage:
    """The location of one storage in the file."""

    dtype: torch.dtype
    offset: int
    length: int


def read_torch(source: ByteSource) -> dict[str, Any]:
    """Return the content of a torch file: stored tensors, plain values, and dictionaries of them.

    Raises:
        CheckpointError: if it is not a torch zip archive, is broken, or does not contain a dictionary.
    """
    with archive(source) as opened:
        entries = {entry.filename: entry for entry in opened.infolist()}
        pickles = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{source.name} is not a torch file: it holds {len(pickles)} data.pkl; expected one, as "
                "torch.save writes."
            )
        folder = pickles[0].removesuffix("data.pkl")
        offsets = dict(zip(entries, stored_offsets(source, list(entries.values())), strict=True))
        if entries[pickles[0]].file_size > LARGEST_PICKLE or offsets[pickles[0]] is None:
            raise CheckpointError(
                f"data.pkl in {source.name} is compressed or larger than {LARGEST_PICKLE} bytes; expected tensors in "
                "dictionaries, as torch.save(sae.state_dict()) writes."
            )
        byteorder = entries.get(f"{folder}byteorder")
        if byteorder is not None and unpacked(source, opened, byteorder) != b"little":
            raise CheckpointError(
                f"{source.name} was written on a big-endian machine; save it again on a little-endian one."
            )
        pickled = unpacked(source, opened, entries[pickles[0]])
        try:
            content = _Reader(pickled, source, offsets, entries, folder).load()
        except CheckpointError:
            raise
        except Exception as error:  # a broken pickle may fail in any way
            why = shown(str(error) or type(error).__name__, 160)
            raise CheckpointError(
                f"{source.name} cannot be read without running code from it ({why}); expected tensors in "
                "dictionaries, as torch.save(sae.state_dict()) writes."
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.name} holds a {type(content).__name__}; expected a dictionary of tensors.")
    return _named(content)


def _named(content: dict[str, Any], depth: int = 2) -> dict[str, Any]:
    """Name the tensors by their keys, in dictionaries within dictionaries, too."""
    named = {}
    for key, value in content.items():
        if isinstance(value, StoredTensor):
            value = replace(value, name=str(key))
        elif isinstance(value, dict) and depth > 1:
            value = _named(value, depth - 1)
        named[str(key)] = value
    return named


class _Instructions(dict[int, Callable[[Any], None]]):
    """The accepted pickle instructions."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"it uses the instruction {chr(code)!r}")


class _Reader(Unpickler):
    """Unpickler of containers, plain values and tensors; any other name or instruction is an error."""

    dispatch = _Instructions(
        (code[0], Unpickler.dispatch[code[0]])
        for code in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.BINPERSID, pickle.REDUCE),
            *(pickle.GLOBAL, pickle.STACK_GLOBAL),
            *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BINUNICODE),
            *(pickle.SHORT_BINUNICODE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
        )
    )

    def __init__(
        self,
        content: bytes,
        source: ByteSource,
        offsets: Mapping[str, int | None],
        entries: Mapping[str, zipfile.ZipInfo],
        folder: str,
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._source = source
        self._offsets = offsets
        self._entries = entries
        self._folder = folder

    def _set_items(self, flat: list[Any]) -> None:
        """Fill the dictionary on top of the stack with keys and values in turn."""
        target = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(target, dict) or len(flat) % 2 or not all(type(key) in KEYS for key in flat[::2]):
            raise pickle.UnpicklingError("it has a dictionary whose keys are not plain values")
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())  # type: ignore[attr-defined]

    def _load_build(self) -> None:
        """Ignore the attributes of an ordered dictionary, in which a state_dict stores versions of modules."""
        self.stack.pop()  # type: ignore[attr-defined]
        if type(self.stack[-1]) is not collections.OrderedDict:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("it sets the state of an object")

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.BUILD[0]] = _load_build

    def find_class(self, module: str, name: str) -> Any:
        """Return a replacement for a name; nothing is imported."""
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: collections.OrderedDict()
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch", "device"):
            return _device
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return str(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the location of a storage."""
        kind, dtype, key, _, count = pid
        name = f"{self._folder}data/{key}" if type(key) is str else ""
        entry = self._entries.get(name)
        if kind != "storage" or not isinstance(dtype, torch.dtype) or entry is None or type(count) is not int:
            raise pickle.UnpicklingError(f"it refers to an unknown storage {shown(pid)}")
        offset = self._offsets[name]
        if offset is None or count * dtype.itemsize != entry.file_size:
            raise CheckpointError(
                f"A storage of {self._source.name} has {entry.file_size} bytes where {count} values of {dtype} are "
                "announced, or is compressed: the file is broken. Fetch it again."
            )
        return _Storage(dtype, offset, count)

    def _tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        """Describe one tensor."""
        sides, steps = tuple(shape)[:MOST_AXES], tuple(strides)[:MOST_AXES]
        valid = all(type(number) is int and number >= 0 for number in (offset, *sides, *steps))
        if not valid or not len(shape) == len(sides) == len(steps) or offset + math.prod(sides) > storage.length:
            raise CheckpointError(
                f"A tensor of {self._source.name} lies outside its storage: the file is broken. Fetch it again."
            )
        start = storage.offset + offset * storage.dtype.itemsize
        if _is_dense(sides, steps):
            return StoredTensor(self._source, "a tensor", storage.dtype, sides, start)
        if len(sides) == 2 and _is_dense(sides[::-1], steps[::-1]):
            return StoredTensor(self._source, "a tensor", storage.dtype, sides[::-1], start, transposed=True)
        raise CheckpointError(
            f"{self._source.name} holds a tensor of shape {shown(list(sides))} with strides {shown(list(steps))}; "
            "expected a contiguous one: save it again with .contiguous()."
        )


def _device(name: str, index: int = 0) -> str:
    """Return the name of a device, in place of the device."""
    if type(name) is not str or type(index) is not int:
        raise pickle.UnpicklingError("it names an invalid device")
    return name


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor is contiguous, the last axis fastest."""
    step = 1
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and stride != step:
            return False
        step *= side
    return True
