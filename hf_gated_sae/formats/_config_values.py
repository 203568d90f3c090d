"""Read and check values of another library's configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError, shown

Default = TypeVar("Default")

_REQUIRED: Any = object()


def integer(config: Mapping[str, Any], key: str, where: object, default: Default = _REQUIRED) -> int | Default:
    """Return a whole number.

    Args:
        config: content of the configuration file.
        key: its key.
        where: the file, for messages.
        default: value for a missing or null key; without a default that is an error.

    Raises:
        CheckpointError: if it is missing without a default, or of another type.
    """
    return _value(config, key, where, default, "a whole number", lambda value: type(value) is int)


def number(config: Mapping[str, Any], key: str, where: object, default: Default = _REQUIRED) -> float | Default:
    """Return a finite number; otherwise as `integer`."""
    return _value(
        config, key, where, default, "a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)
    )


def text(config: Mapping[str, Any], key: str, where: object, default: Default = _REQUIRED) -> str | Default:
    """Return a text; otherwise as `integer`."""
    return _value(config, key, where, default, "a text", lambda value: isinstance(value, str))


def flag(config: Mapping[str, Any], key: str, where: object, default: Default = _REQUIRED) -> bool | Default:
    """Return true or false; otherwise as `integer`."""
    return _value(config, key, where, default, "true or false", lambda value: isinstance(value, bool))


def mapping(config: Mapping[str, Any], key: str, where: object, default: Default = _REQUIRED) -> Any | Default:
    """Return a mapping; otherwise as `integer`."""
    return _value(config, key, where, default, "a mapping", lambda value: isinstance(value, dict))


def one_of(
    config: Mapping[str, Any], key: str, where: object, known: tuple[str, ...], default: Any = _REQUIRED
) -> Any:
    """Return one of the known texts; otherwise as `integer`."""
    return _value(config, key, where, default, f"one of {', '.join(known)}", lambda value: value in known)


def _value(config: Mapping[str, Any], key: str, where: object, default: Any, expected: str, fits: Any) -> Any:
    """Return a value that fits, or the default if it is missing."""
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"{where} has no {key}; expected {expected}: fetch it again, or complete it.")
        return default
    try:
        if fits(value):
            return value
    except (TypeError, OverflowError):
        pass
    raise CheckpointError(f"{where} has {key} = {shown(value)}; expected {expected}.")
