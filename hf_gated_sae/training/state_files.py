"""Nested states on disk without pickles: numbers and texts as JSON, tensors as safetensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, InputError

_TENSOR = "__tensor__"


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write ``name.json`` and, if there are tensors, ``name.safetensors``.

    Args:
        folder: where to write; it exists.
        name: of both files, without ending.
        state: mappings of texts, lists, numbers, texts, None and tensors, nested in any way.

    Raises:
        InputError: for anything else, naming its place.
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_without_tensors(state, "", tensors))
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    if tensors:
        save_file(_apart(tensors), folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Return what `write_state` wrote; tensors are on the CPU, tuples have become lists.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    path, stored = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(stored) if stored.is_file() else {}
        return _with_tensors(content, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} and what lies beside it cannot be read as a training state: {error}") from error


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested value into `tensors`, leaving their places behind."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"The state has the key {strange[0]!r} at {place or 'its top'}; expected texts as keys.")
        below = f"{place}/" if place else ""
        return {key: _without_tensors(each, f"{below}{key}", tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, f"{place}/{number}", tensors) for number, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(
        f"The state has a {type(value).__name__} at {place}; expected tensors, numbers, texts, None, lists, mappings."
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors back into their places."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(each, tensors) for key, each in value.items()}
    return [_with_tensors(each, tensors) for each in value] if isinstance(value, list) else value


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in memory of their own each, which safetensors insists on."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result
