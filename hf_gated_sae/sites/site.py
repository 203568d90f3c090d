"""The grammar of site names: a semantic name, ``resid_post.12``, or a module path, ``model.norm.output``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SiteError, did_you_mean

LAYERED = (
    "resid_pre",
    "attn_in",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_neurons",
    "mlp_out",
    "resid_post",
)
"""Semantic names that need a layer, in the order in which a sequential block runs through them."""

GLOBAL = ("embed", "final_norm")
"""Semantic names of which a model has one."""

PORTS = ("input", "output")
"""The two sides of a module."""

_INTEGER = re.compile(r"[0-9]+")
_MODULE_PATH = re.compile(r"[^\s.]+(\.[^\s.]+)*")
_HELP = (
    "A site is 'embed', 'final_norm', one of "
    + ", ".join(f"'{name}.L'" for name in LAYERED)
    + " with a layer number L, "
    "or a module path that ends in '.input' or '.output', such as 'model.layers.3.mlp.output'."
)


@dataclass(frozen=True, slots=True)
class Site:
    """The name of one place in a model, hashable, and written by `str`.

    Args:
        name: a semantic name, or a dotted module path.
        layer: layer number; only for the layered semantic names.
        port: ``"input"`` or ``"output"``; only for module paths.
    """

    name: str
    layer: int | None = None
    port: str | None = None

    def __post_init__(self) -> None:
        """Refuse what the grammar does not have."""
        if self.port is not None:
            valid = self.port in PORTS and self.layer is None and _MODULE_PATH.fullmatch(self.name) is not None
        elif self.name in GLOBAL:
            valid = self.layer is None
        else:
            valid = self.name in LAYERED and isinstance(self.layer, int) and self.layer >= 0
        if not valid:
            raise SiteError(f"Not a site: name={self.name!r}, layer={self.layer!r}, port={self.port!r}. {_HELP}")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a site from its name.

        Args:
            text: the name, such as ``"resid_post.12"``; a `Site` is returned unchanged.

        Returns:
            The site, whose `str` is the name.

        Raises:
            SiteError: if the name does not follow the grammar; the message lists close matches.
        """
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SiteError(f"A site is named by a string, not by {text!r}. {_HELP}")
        head, dot, last = text.rpartition(".")
        if text in GLOBAL:
            return cls(text)
        if dot and last in PORTS and _MODULE_PATH.fullmatch(head):
            return cls(head, port=last)
        if head in LAYERED and _INTEGER.fullmatch(last):
            return cls(head, layer=int(last))
        raise SiteError(_complaint(text, head, last))

    @property
    def is_path(self) -> bool:
        """Whether this is a module path rather than a semantic name."""
        return self.port is not None

    def __str__(self) -> str:
        """Return the name that `parse` reads."""
        if self.port is not None:
            return f"{self.name}.{self.port}"
        return self.name if self.layer is None else f"{self.name}.{self.layer}"


def _complaint(text: str, head: str, last: str) -> str:
    """Say what is wrong with a name that no rule of the grammar accepts."""
    if text in LAYERED:
        return f"The site {text!r} needs a layer number, such as '{text}.0'."
    if head in GLOBAL:
        return f"The site {head!r} takes no layer, so {text!r} is not a site; write {head!r}."
    if head in LAYERED:
        return f"{last!r} in the site {text!r} is not a layer number; write a count from zero, such as '{head}.0'."
    stem = head if head and _INTEGER.fullmatch(last) else text
    close = did_you_mean(stem, (*LAYERED, *GLOBAL))
    if not close and head:
        close = did_you_mean(last, PORTS)
    return f"{text!r} is not a site.{close} {_HELP}"
