"""Nested states on disk without pickles: numbers and strings as JSON, tensors as safetensors."""

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
        folder: an existing folder.
        name: of both files, without suffix.
        state: nested mappings with string keys, lists, numbers, strings, None and tensors.

    Raises:
        InputError: for a value of another type, with its path in the state.
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps(_without_tensors(state, "", tensors))
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    if tensors:
        save_file(_in_separate_memory(tensors), folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Return a state written by `write_state`; tensors are on the CPU, tuples have become lists.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    path, stored = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(stored) if stored.is_file() else {}
        return _with_tensors(content, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} and {stored.name} cannot be read as a training state: {error}") from error


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with its tensors moved into `tensors` and replaced by references to their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"The state has the key {other[0]!r} at {path or 'its top'}; expected strings as keys.")
        below = f"{path}/" if path else ""
        return {key: _without_tensors(each, f"{below}{key}", tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, f"{path}/{number}", tensors) for number, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(
        f"The state has a {type(value).__name__} at {path}; expected tensors, numbers, strings, None, lists, mappings."
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a nested value with references replaced by their tensors."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(each, tensors) for key, each in value.items()}
    return [_with_tensors(each, tensors) for each in value] if isinstance(value, list) else value


def _in_separate_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without shared memory, as safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result
