"""What a library is that names places, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...registry import Registry

LAYER, LAST = "{layer}", "{last}"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name stands for.

    Args:
        site: a site, with ``{layer}`` for a layer that the name may not say and ``{last}`` for the last block's.
        layer: the layer that the name says.
        of_module: the name stands for what the module gives that takes the site. In many families that is not what is
            added to the stream: a norm follows, or the module adds the stream itself.
    """

    site: str
    layer: int | None = None
    of_module: bool = False

    def __str__(self) -> str:
        """Return it in words."""
        layer = "L" if self.layer is None else str(self.layer)
        site = self.site.replace(LAYER, layer).replace(LAST, "LAST")
        return f"what the module gives that takes '{site}'" if self.of_module else f"'{site}'"


@dataclass(frozen=True, slots=True)
class Library:
    """How one library names places.

    Args:
        title: the library's name, as its authors write it.
        meaning: returns what a name stands for, or None if it is none of the library's.
        known: its names, as they are suggested for one that is misspelt.
        borrows: libraries whose names it uses, too, by their names in the registry.
    """

    title: str
    meaning: Callable[[str], Meaning | None]
    known: tuple[str, ...]
    borrows: tuple[str, ...] = ()


libraries: Registry[Library] = Registry("library", "hf_gated_sae.sites.names")
"""Libraries by the name of their file."""
