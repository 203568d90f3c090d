"""Encode the index of known SAEs: many records as a few patterns with axes of values. `hub.index` decodes it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, str]
Tree = dict[str, Any] | str

_TOKEN = re.compile(r"\d+[km](?![A-Za-z])|\d+|(?:small|medium|big)(?:_affine)?(?![A-Za-z])")
"""Parts of a text that may vary in a group: a number, a short width, one of Gemma Scope 2's levels of sparsity."""
NUMBERS = ("d_sae", "l0", "input_scale")
"""Fields whose whole text is one value."""
MOST_ORDERS = 720
SHORTEST_RANGE = 3


def grouped(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return groups of patterns and values that `hub.index` expands to exactly these records.

    Records whose texts differ only in numbers form a group. A number that is the same in all of them stays in the
    pattern; the others become axes. Numbers that are equal to each other in every record share one axis.

    Args:
        records: texts by field; ``id`` and ``address`` are required.
    """
    families: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        shape = tuple((name, _mask(name, text)) for name, text in sorted(record.items()))
        families.setdefault(shape, []).append(record)
    return [_group(members) for members in families.values()]


def _mask(name: str, text: str) -> str:
    """Return a text without the parts that may vary."""
    return "" if name in NUMBERS else _TOKEN.sub("\0", text)


def _group(members: Sequence[Record]) -> dict[str, Any]:
    """Return the patterns, axes and values of records of one shape."""
    axes: dict[tuple[str, ...], str] = {}
    patterns = {name: _pattern(name, [record[name] for record in members], axes) for name in _order(members[0])}
    if patterns["address"] == patterns["id"]:
        del patterns["address"]
    for name in NUMBERS:
        # Constants are written as numbers, except short names such as 16k.
        if (text := patterns.get(name, "")).replace(".", "", 1).isdigit():
            patterns[name] = json.loads(text)
    if not axes:
        return {**patterns, "axes": [], "values": ""}
    rows = list(zip(*axes, strict=True))
    order = _best_order(rows)
    labels = list(axes.values())
    return {**patterns, "axes": [labels[index] for index in order], "values": _tree(_reordered(rows, order))}


def _order(record: Record) -> list[str]:
    """Return the fields in the order that gives each axis the best name: `site` and numbers name their axes first."""
    return sorted(record, key=lambda name: name not in ("site", *NUMBERS))


def _pattern(name: str, texts: Sequence[str], axes: dict[tuple[str, ...], str]) -> str:
    """Return the common text, with names of axes where the texts differ; new axes are added to `axes`."""
    if name in NUMBERS:
        return _placeholder(name, tuple(texts), axes)
    columns = list(zip(*(_TOKEN.findall(text) for text in texts), strict=True))
    tokens = iter([_placeholder(name, column, axes) for column in columns])
    return _TOKEN.sub(lambda _: next(tokens), texts[0])


def _placeholder(name: str, column: tuple[str, ...], axes: dict[tuple[str, ...], str]) -> str:
    """Return the text that all records have in common here, or a placeholder for its axis."""
    if len(set(column)) == 1:
        return column[0]
    if column not in axes:
        label = {"site": "layer", "d_sae": "width"}.get(name, name if name in NUMBERS else f"n{len(axes)}")
        axes[column] = label if label not in axes.values() else f"n{len(axes)}"
    return f"{{{axes[column]}}}"


def _best_order(rows: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
    """Return the order of axes that makes the tree of values shortest."""
    # With many axes the order hardly matters, as few rows share values.
    orders = itertools.islice(itertools.permutations(range(len(rows[0]))), MOST_ORDERS)
    return min(orders, key=lambda order: len(json.dumps(_tree(_reordered(rows, order)))))


def _reordered(rows: Sequence[tuple[str, ...]], order: Sequence[int]) -> list[tuple[str, ...]]:
    return [tuple(row[index] for index in order) for row in rows]


def _tree(rows: Sequence[tuple[str, ...]]) -> Tree:
    """Return rows of values as nested mappings; keys with the same content below are merged."""
    if len(rows[0]) == 1:
        return _joined([row[0] for row in rows])
    below: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in rows:
        below.setdefault(first, []).append(tuple(rest))
    same: dict[str, list[str]] = {}
    for value, members in below.items():
        same.setdefault(json.dumps(_tree(members), sort_keys=True), []).append(value)
    return {_joined(values): json.loads(tree) for tree, values in same.items()}


def _joined(values: list[str]) -> str:
    """Return values as one text, runs of whole numbers as ``first-last``."""
    ordered = sorted(set(values), key=lambda value: (not value.isdigit(), int(value) if value.isdigit() else 0, value))
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(ordered), key=lambda item: _run_key(*item)):
        members = [value for _, value in run]
        parts += [f"{members[0]}-{members[-1]}"] if len(members) >= SHORTEST_RANGE else members
    return ",".join(parts)


def _run_key(index: int, value: str) -> object:
    """Return a key that is the same for all members of a run of consecutive whole numbers."""
    return int(value) - index if value.isdigit() and str(int(value)) == value else value
