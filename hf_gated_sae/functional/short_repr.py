"""Reprs of reports that fit a few lines, however large the report is; the data is in its attributes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

COLUMNS, LINES = 119, 10
_ITEMS, _CHARACTERS = 4, 200


def few_lines(parts: Iterable[str]) -> str:
    """Join texts, each starting on a new line, into at most 10 lines of 119 columns.

    Args:
        parts: the texts; if there are too many, the last line states how many were left out.
    """
    lines: list[str] = []
    several = list(parts)
    for number, part in enumerate(several):
        here = textwrap.wrap(part, COLUMNS, subsequent_indent="    ", max_lines=LINES, placeholder=" ...") or [""]
        if len(lines) + len(here) > LINES - (number < len(several) - 1):
            lines.append(f"... and {len(several) - number} more")
            break
        lines += here
    return "\n".join(lines)


def short_repr(report: Any) -> str:
    """Return the class name and the fields of a dataclass; for use as its ``__repr__``.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Counted:
    ...     tokens: int
    ...     fired: tuple[int, ...]
    ...     __repr__ = short_repr
    >>> Counted(12, tuple(range(1000)))
    Counted(tokens=12, fired=(0, 1, 2, 3, ... 1000 in all))
    """
    return few_lines([_fields(report, 0)])


def _fields(report: Any, depth: int) -> str:
    names = getattr(report, "_fields", None) or [field.name for field in fields(report)]
    shown = ", ".join(f"{name}={_short(getattr(report, name), depth)}" for name in names)
    return f"{type(report).__name__}({shown})"


def _short(value: Any, depth: int = 0) -> str:
    """Return a value's repr, or its type and size if that would be long."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(_cut(value))
    many = isinstance(value, (Mapping, Sequence, set, frozenset))
    if (many or is_dataclass(value)) and depth > 1:
        return f"{type(value).__name__}(...)"
    if isinstance(value, Mapping):
        shown = [f"{_short(key, depth + 1)}: {_short(each, depth + 1)}" for key, each in islice(value.items(), _ITEMS)]
        return f"{{{_joined(shown, len(value))}}}"
    if many and not isinstance(value, bytes):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return f"{opening}{_joined([_short(each, depth + 1) for each in islice(value, _ITEMS)], len(value))}{closing}"
    if is_dataclass(value) and not isinstance(value, type):
        return _fields(value, depth + 1)
    return _cut(" ".join(repr(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}..."


def _joined(shown: list[str], count: int) -> str:
    return ", ".join([*shown, *([f"... {count} in all"] if count > len(shown) else [])])
