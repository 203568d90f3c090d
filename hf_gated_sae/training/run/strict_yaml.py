"""Strict reading of nested mappings, from YAML and from flags, into dataclasses; errors state the path of the key.

This is not done by a configuration library, which would accept what is refused here: OmegaConf converts 3 to text,
`on` to true and `${...}` to a reference; jsonargparse accepts a key that is given twice, and a `class_path` to import.
pydantic can be as strict, but rewriting every type and translating every error for it takes more lines than this file.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ...errors import InputError, MissingFileError, did_you_mean, shown

Section = TypeVar("Section")
REST = {"rest": True}
"""Metadata of the field for all keys that are not names of fields."""

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


class _GivenTwice(yaml.constructor.ConstructorError):
    """A key that is given twice."""


class _Strict(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would silently drop the first one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise _GivenTwice(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class FlagText(str):
    """The value of a flag: text that a field of another type reads as YAML."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        MissingFileError: if there is no such file.
        InputError: if it is not YAML, or not a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"There is no file {file}; expected the YAML file of a run.")
    try:
        content = _loaded(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {shown(content)}; expected a mapping such as 'model: ...'.")
    return content


def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Strict)  # noqa: S506  # a SafeLoader


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Turn ``--training.learning_rate 1e-4 --data.files=[a.txt] --training.bf16`` into a nested mapping.

    Args:
        words: of the command line; a flag without a value means true.

    Raises:
        InputError: for a word that is not a flag, or one that contradicts another.

    >>> read_flags(["--seed", "3", "--training.bf16"])
    {'seed': '3', 'training': {'bf16': 'true'}}
    """
    found: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"Given {word!r}; expected a flag such as --training.learning_rate 1e-4.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = "true" if not waiting or waiting[0].startswith("--") else waiting.pop(0)
        *parents, leaf = name.split(".")
        here = found
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise InputError(f"--{name} contradicts --{'.'.join(parents)}, which is given a value of its own.")
        if leaf in here:
            raise InputError(f"--{name} is given twice.")
        here[leaf] = FlagText(value)
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings laid over each other; values that are not mappings in both are replaced.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        result[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def leaves(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted place and the value of everything that is not a mapping.

    >>> dict(leaves({"a": {"b": 1}, "c": 2}))
    {'a.b': 1, 'c': 2}
    """
    for name, value in values.items():
        here = f"{place}{name}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{here}.")
        else:
            yield here, value


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init}


def read_section(cls: type[Section], values: Mapping[str, Any], place: str = "") -> Section:
    """Build a dataclass from a mapping.

    Args:
        cls: the dataclass; its fields may in turn be dataclasses, or mappings of them.
        values: what is given.
        place: where it is in the whole, such as ``"data."``.

    Raises:
        InputError: for a key that no field has, with close matches; a value of another type; a value that is missing.
    """
    hints: dict[str, Any] = hints_of(cls)  # type: ignore[arg-type]  # a class is hashable
    rest = [each.name for each in fields(cls) if each.metadata == REST]  # type: ignore[arg-type]  # a dataclass
    known = [name for name in hints if name not in rest]
    others = {str(name): value for name, value in values.items() if name not in known}
    if others and not rest:
        raise unknown_key(next(iter(others)), place, known)
    given = {name: read_value(hints[name], value, f"{place}{name}") for name, value in values.items() if name in known}
    given |= dict.fromkeys(rest, others)
    for each in fields(cls):  # type: ignore[arg-type]  # a dataclass
        if each.name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{place}{each.name} is missing; it has no default.")
    return cls(**given)


def unknown_key(name: object, place: str, known: Sequence[str]) -> InputError:
    """Return the error for a key that is not known at a place."""
    where = place.rstrip(".") or "the configuration"
    close = did_you_mean(name, known) or f" Known: {', '.join(known)}."
    return InputError(f"Unknown key {place}{name}: {where} has no {str(name)!r}.{close}")


def read_value(hint: Any, value: Any, place: str) -> Any:
    """Convert a value to the type of its field.

    Args:
        hint: the type.
        value: from YAML, or the text of a flag.
        place: its dotted name, for errors.

    Raises:
        InputError: if it is of another type.
    """
    for candidate in _candidates(value, place):
        for option in _options(hint):
            fitting, result = _fit(option, candidate, place)
            if fitting:
                return result
    wanted = " or ".join(dict.fromkeys(_wanted(option) for option in _options(hint)))
    raise InputError(f"{place} is {shown(value)}; expected {wanted}.")


def _candidates(value: Any, place: str) -> list[Any]:
    """Return the possible readings of a value: the text of a flag is read as YAML, or else as text."""
    if not isinstance(value, FlagText):
        return [value]
    try:
        return [_loaded(value), str(value)]
    except _GivenTwice as error:
        raise InputError(f"{place} is not valid YAML ({' '.join(str(error).split())}).") from error
    except (yaml.YAMLError, RecursionError):
        return [str(value)]


def _options(hint: Any) -> list[Any]:
    """Return the members of a union; text comes last."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return sorted(typing.get_args(hint) if union else [hint], key=lambda option: option is str)


def _fit(option: Any, value: Any, place: str) -> tuple[bool, Any]:
    """Return whether a value fits a type, and the value converted to it."""
    origin = typing.get_origin(option) or option
    if is_dataclass(option) and isinstance(value, Mapping):
        return True, read_section(option, value, f"{place}.")  # type: ignore[arg-type]  # a class, not an instance
    if origin is dict and isinstance(value, Mapping):
        inner = (typing.get_args(option) or (str, Any))[1]
        return True, {str(name): read_value(inner, each, f"{place}.{name}") for name, each in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        inner = (typing.get_args(option) or (Any,))[0]
        return True, [read_value(inner, each, f"{place}[{number}]") for number, each in enumerate(value)]
    if choices := _choices(option):
        said = "no" if value is False and "no" in choices else value  # YAML reads "no" as false
        return said in choices, said
    if origin in (int, float):
        number = _number(value, origin)
        return number is not None, number
    if option is Any or not isinstance(origin, type) or is_dataclass(option):
        return option is Any, _plain(value)
    return isinstance(value, origin), value


def _plain(value: Any) -> Any:
    """Return a value with the texts of flags in it read as YAML."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return _candidates(value, "")[0]


def _number(value: Any, kind: type) -> Any:
    """Return a number, None for anything else; YAML reads ``1e-4``, which has no point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    number = number if isinstance(value, str) else value
    return number if kind is float else int(number) if float(number).is_integer() else None


def _choices(option: Any) -> tuple[Any, ...]:
    """Return the values of a Literal or an enumeration; empty for another type."""
    if isinstance(option, type) and issubclass(option, Enum):
        return tuple(each.value for each in option)
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _wanted(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin in _WORDS:
        return _WORDS[origin]
    if choices := _choices(option):
        return f"one of {', '.join(map(str, choices))}"
    return "a list" if origin in (list, tuple) else "a mapping"
