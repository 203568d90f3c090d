"""What names stand for in the libraries that know them."""

from __future__ import annotations

from .base import Meaning, libraries


def explain(text: str) -> str:
    """Return whose name a text is and what of, in words; empty if nobody's."""
    return " and ".join(f"{title}'s name of {meaning}" for meaning, title in meanings(text).items())


def meanings(text: str) -> dict[Meaning, str]:
    """Return what a name stands for, each with the library that means it."""
    found: dict[Meaning, str] = {}
    for library in libraries.values():
        meaning = library.meaning(text)
        if meaning is not None:
            found.setdefault(meaning, library.title)
    return found
