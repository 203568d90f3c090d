"""The licence under which a checkpoint was published, as stated in its repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..errors import InputError, PublishError
from ..hub.licences import OTHER, normalise
from ..hub.location import Location
from .markdown import OF_LICENCE, decoded, split_front_matter
from .save_published import CARD_FILE

FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt", "COPYING")
LARGEST = 1 << 20  # bytes of a card or a licence
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge, to any person\s+obtaining\s+a\s+copy",
    "bsd-3-clause": r"Redistribution and use in source and binary forms.*Neither the name",
    "cc-by-4.0": r"(?:Creative Commons )?(?<!-)Attribution 4\.0 International",
    "cc0-1.0": r"CC0 1\.0 Universal",
}
# Errors that yaml raises, besides its own, for malformed values such as the date 2020-99-99.
_YAML_ERRORS = (ValueError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Licence:
    """The licence of a checkpoint.

    Attributes:
        name: identifier of the Hub, such as ``"apache-2.0"``; None if it is not known.
        evidence: where it is stated, or why it is not known, as a phrase for the card.
        title: name of a licence ``"other"``.
        link: of a licence ``"other"``: an address, or a file of the repository.
    """

    name: str | None
    evidence: str
    title: str | None = None
    link: str | None = None


def stated_licence(location: Location) -> Licence:
    """Return the licence of a checkpoint: that of its own folder, else of the nearest parent that states one.

    In each folder the metadata of ``README.md`` takes precedence over the text of a ``LICENSE`` file, which is
    recognised for a few common licences. The repository's statement is not checked, and nothing is guessed.

    Args:
        location: the checkpoint.
    """
    doubts = []
    folder = PurePosixPath(location.subfolder)
    for path in (folder, *folder.parents) if location.subfolder else (folder,):
        here = location.at(str(path))
        for found in (_of_card(here), _of_file(here)):
            if found is not None and found.name:
                return found
            if found is not None:
                doubts.append(found.evidence)
    return Licence(None, "; ".join(doubts) or "the source states none")


def _of_card(location: Location) -> Licence | None:
    """Return the licence in the card's metadata; None if it states none."""
    if CARD_FILE not in location:
        return None
    source = f"metadata of the source's {_path(location, CARD_FILE)}"
    try:
        data, _ = split_front_matter(decoded(location.read_bytes(CARD_FILE), CARD_FILE))
    except (PublishError, *_YAML_ERRORS):
        return Licence(None, f"the {source} cannot be read")
    return _licence(data, source)


def _licence(data: Mapping[str, Any], source: str) -> Licence | None:
    """Return the licence in the front matter of a card; None if it states none."""
    stated = data.get("license")
    names = [str(name).strip().lower() for name in (stated if isinstance(stated, list) else [stated]) if name]
    if not names:
        return None
    if names == ["unknown"]:
        return Licence(None, f"the {source} states that it is unknown")
    if len(names) > 1:
        return Licence(OTHER, f"{source}: {' or '.join(names)}", title=" or ".join(names))
    if names == [OTHER]:
        title, link = (str(data[key]) if data.get(key) else None for key in OF_LICENCE)
        if title is None and link is None:
            return Licence(None, f"the {source} states 'other' without a name")
        return Licence(OTHER, f"{source}: {', '.join(filter(None, (title, link)))}", title=title or link, link=link)
    try:
        return Licence(normalise(names[0]), source)
    except InputError:  # a name that is not on the Hub's list
        return Licence(OTHER, f"{source}: {names[0]}", title=names[0])


def _of_file(location: Location) -> Licence | None:
    """Return the licence of a folder's licence file; None if there is no such file."""
    for name in FILES:
        if name in location:
            text = _text(location, name)
            known = [licence for licence, pattern in _TEXTS.items() if re.search(pattern, text, re.DOTALL | re.I)]
            path = _path(location, name)
            if len(known) == 1:
                return Licence(known[0], f"text of the source's {path}")
            return Licence(None, f"the source's {path} is not one of the licences that are recognised")
    return None


def _text(location: Location, name: str) -> str:
    """Return the beginning of a text file in any encoding."""
    return location.read_bytes(name)[:LARGEST].decode("utf-8", errors="replace")


def _path(location: Location, name: str) -> str:
    return f"{location.subfolder}/{name}" if location.subfolder else name
