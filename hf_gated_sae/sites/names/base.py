"""Base classes for reading another library's names, and the registry of such libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...registry import Registry

LAYER, LAST = "{layer}", "{last}"


@dataclass(frozen=True, slots=True)
class Meaning:
    """The activation that a name stands for.

    Args:
        site: a site, with ``{layer}`` for a layer that may be missing in the name and ``{last}`` for the last block.
        layer: the layer in the name.
        of_module: the name stands for the output of the module whose input is `site`. In many families that is not
            what is added to the stream: a norm follows, or the module adds the stream itself.
    """

    site: str
    layer: int | None = None
    of_module: bool = False

    def __str__(self) -> str:
        """Return a description for messages."""
        layer = "L" if self.layer is None else str(self.layer)
        site = self.site.replace(LAYER, layer).replace(LAST, "LAST")
        return f"the output of the module whose input is '{site}'" if self.of_module else f"'{site}'"


@dataclass(frozen=True, slots=True)
class Library:
    """How one library names activations.

    Args:
        title: the library's name, as its authors write it.
        meaning: returns the meaning of a name, or None if the library has no such name.
        known: its names, for suggestions when a name is misspelt.
        borrows: registry names of libraries whose names it also uses.
    """

    title: str
    meaning: Callable[[str], Meaning | None]
    known: tuple[str, ...]
    borrows: tuple[str, ...] = ()


libraries: Registry[Library] = Registry("library", "hf_gated_sae.sites.names")
"""Libraries by the name of their file."""
