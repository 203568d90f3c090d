"""What names stand for in the libraries that know them."""

from __future__ import annotations

from .base import Meaning, libraries


def explain(text: str) -> str:
    """Return the libraries that have a name, and its meaning in them, in words; empty if none has it."""
    return " and ".join(f"{title}'s name of {meaning}" for meaning, title in meanings(text).items())


def meanings(text: str) -> dict[Meaning, str]:
    """Return the meanings of a name, each with the first library that has it."""
    found: dict[Meaning, str] = {}
    for library in libraries.values():
        meaning = library.meaning(text)
        if meaning is not None:
            found.setdefault(meaning, library.title)
    return found
