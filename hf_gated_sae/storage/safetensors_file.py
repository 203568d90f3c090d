"""Read the headers of safetensors files."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from ..errors import CheckpointError, shown
from .bytes import ByteSource
from .stored import MOST_AXES, StoredTensor

LARGEST_HEADER = 16 * 1024 * 1024  # names, shapes and offsets of a hundred thousand tensors
FIRST_READ = 32_768  # enough for the header of one SAE
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(source: ByteSource) -> dict[str, Any]:
    """Return the tensors of a safetensors file: 8 bytes of header length, a JSON header, then the values.

    Raises:
        CheckpointError: if the header is broken, or the tensors do not fill the file exactly.
    """
    size = source.size
    [start] = source.read([(0, min(size, FIRST_READ))])
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
        raise _broken(source, f"its header claims {length} bytes in a file of {size}")
    if len(start) < 8 + length:
        start += source.read([(len(start), 8 + length - len(start))])[0]
    try:
        header = json.loads(start[8 : 8 + length], object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise _broken(source, f"its header is not JSON ({str(error)[:200]})") from error
    if not isinstance(header, dict):
        raise _broken(source, f"its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    found = {name: _entry(source, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise _broken(source, f"{tensor.name} starts at byte {tensor.offset} where {end} is expected")
        end += tensor.nbytes
    if end != size:
        raise _broken(source, f"its tensors end at byte {end} and the file at {size}")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of the header; a name that occurs twice is refused, as readers differ in which one they use."""
    built = dict(pairs)
    if len(built) != len(pairs):
        raise ValueError("a name occurs twice")
    return built


def _entry(source: ByteSource, name: str, entry: Any, start: int) -> StoredTensor:
    """Read one entry of the header."""
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sides = tuple(side for side in shape[:MOST_AXES] if type(side) is int and side >= 0)
        consistent = len(sides) == len(shape) and last - first == math.prod(sides) * dtype.itemsize and first >= 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"the entry of {shown(name)} is {shown(entry, 120)}, not a tensor of a supported type"
        raise _broken(source, why) from error
    if not consistent or type(first) is not int:
        raise _broken(source, f"shape and offsets of {shown(name)} do not match ({shown(entry, 120)})")
    return StoredTensor(source, name, dtype, sides, start + first)


def _broken(source: ByteSource, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source.name} cannot be read: {why}. Expected a complete safetensors file; fetch it again."
    )
