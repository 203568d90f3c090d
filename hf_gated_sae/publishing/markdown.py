"""Markdown with YAML front matter, in which only marked sections are generated."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from ..errors import PublishError

OF_LICENCE = ("license_name", "license_link")
"""Keys of the front matter that describe a licence ``other``."""

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def number(value: object) -> str:
    """Return a value for a table: a float with four significant digits, an integer with all digits.

    >>> number(0.123456), number(100000), number(None)
    ('0.1235', '100,000', 'undefined')
    """
    if value is None:
        return "undefined"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cell(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cell(value: object) -> str:
    """Return a text escaped for a Markdown table cell."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


def marked(section: str, body: str) -> str:
    """Enclose `body` in the comments that mark a generated section."""
    return f"{_begin(section)}\n\n{body.strip()}\n\n{_end(section)}\n"


def with_front_matter(data: Mapping[str, Any], body: str) -> str:
    """Put YAML before a Markdown text."""
    block = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{block}---\n\n{body}"


def decoded(content: bytes, what: str) -> str:
    """Return the text of a README or another file that may be hand-written, with ``\\n`` as line ends.

    A byte order mark, which some editors write before UTF-8, is dropped: it would hide the front matter. Other
    encodings are not guessed.

    Args:
        content: of the file.
        what: name of the file in messages.

    Raises:
        PublishError: if it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PublishError(
            f"{what} is not in UTF-8 (byte {error.start} is 0x{content[error.start]:02x}), so it cannot be read and "
            "kept. Nothing was written: save it as UTF-8, then try again."
        ) from error


def merge(
    existing: str | None,
    new: str,
    section: str,
    *,
    yielding: Collection[str] = (),
    generated: Collection[str] = (),
) -> str:
    """Merge a generated card into a README that people may have edited.

    Only the marked section is replaced, or appended if there is none. Keys of the front matter that only the existing
    text has are kept, and tags are united.

    Args:
        existing: the current README; None if there is none.
        new: front matter and one marked section.
        section: name of the section.
        yielding: keys of the front matter whose existing value stays.
        generated: keys that are always generated: those of an earlier section are removed with it.

    Raises:
        PublishError: if the existing front matter cannot be read, or the section's end mark is missing.
    """
    if existing is None or not existing.strip():
        return new
    old_data, old_body = split_front_matter(existing)
    new_data, new_section = split_front_matter(new)
    start = old_body.find(_begin(section))
    if start >= 0:
        old_data = {key: value for key, value in old_data.items() if key not in generated}
    tags = [*(old_data.get("tags") or []), *(new_data.get("tags") or [])]
    kept = {key: old_data[key] for key in yielding if key in old_data}
    # The name and link of a licence are kept or removed together with it.
    outdated = new_data if "license" in kept or "license" not in new_data else old_data
    for key in OF_LICENCE:
        outdated.pop(key, None)
    data = {**old_data, **new_data, **kept, **({"tags": list(dict.fromkeys(tags))} if tags else {})}
    if start < 0:
        return with_front_matter(data, f"{old_body.strip()}\n\n{new_section}")
    stop = old_body.find(_end(section), start)
    if stop < 0:
        raise PublishError(
            f"The README has the mark {_begin(section)!r} but not {_end(section)!r}: restore it where the generated "
            "section ends, or remove both."
        )
    after = old_body[stop + len(_end(section)) :].lstrip("\n")
    before = old_body[:start].strip("\n")
    return with_front_matter(data, "\n".join(part for part in (before and before + "\n", new_section, after) if part))


def split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Return the YAML mapping at the top of a text (empty if there is none), and the rest.

    Raises:
        PublishError: if the YAML is broken.
    """
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1]) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError for a date such as 2020-99-99
        line = str(error).splitlines()[0]
        raise PublishError(
            f"The README's YAML front matter is broken ({line}): correct it, then publish again."
        ) from error
    if not isinstance(data, dict):
        raise PublishError(f"The README's front matter holds a {type(data).__name__}; expected YAML keys and values.")
    if isinstance(data.get("tags"), str):
        data["tags"] = [data["tags"]]
    return data, text[found.end() :].lstrip("\n")


def _begin(section: str) -> str:
    return f"<!-- hf-gated-sae {section}: generated, edits up to the end mark are replaced -->"


def _end(section: str) -> str:
    return f"<!-- hf-gated-sae {section}: end -->"
