"""The grammar of site names: ``resid_post.12`` or a module path ``model.norm.output``, then ``|transform``."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass

from ..errors import SiteError, did_you_mean
from .names import explain
from .transforms import Transform

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
"""Semantic names that need a layer, in the order in which a sequential block computes them."""

GLOBAL = ("embed", "final_norm")
"""Semantic names without a layer."""

PORTS = ("input", "output")
"""The two ports of a module."""

_INTEGER = re.compile(r"[0-9]{1,18}")  # Python refuses to convert thousands of digits
_LAYER = re.compile(r"([^.]+)\.([0-9]+)")
_MODULE_PATH = re.compile(r"[^\s.|#]+(\.[^\s.|#]+)*")
_HELP = (
    "A site is 'embed', 'final_norm', one of "
    + ", ".join(f"'{name}.L'" for name in LAYERED)
    + " with a layer number L, "
    "or a module path that ends in '.input' or '.output', such as 'model.layers.3.mlp.output'."
)


@dataclass(frozen=True, slots=True)
class Site:
    """The name of one activation in a model; hashable, and `str` returns the name as text.

    Args:
        name: a semantic name, or a dotted module path.
        layer: layer number; only for the layered semantic names.
        port: ``"input"`` or ``"output"``; only for module paths.
        index: index of the tensor at that port, counted from 0; None for the activation. Only for module paths.
        transforms: transforms applied on reading, in this order; undone on writing.
    """

    name: str
    layer: int | None = None
    port: str | None = None
    index: int | None = None
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        """Refuse combinations that are not in the grammar."""
        if self.port is not None:
            valid = self.port in PORTS and self.layer is None and _MODULE_PATH.fullmatch(self.name) is not None
            valid = valid and (self.index is None or _is_count(self.index))
        elif self.name in GLOBAL:
            valid = self.layer is None and self.index is None
        else:
            valid = self.name in LAYERED and _is_count(self.layer) and self.index is None
        if not valid:
            raise SiteError(
                f"Not a site: name={self.name!r}, layer={self.layer!r}, port={self.port!r}, index={self.index!r}. "
                f"{_HELP}"
            )
        if not isinstance(self.transforms, tuple) or not all(isinstance(t, Transform) for t in self.transforms):
            raise SiteError(f"Not a site: transforms={self.transforms!r}; expected a tuple of Transform.")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a site from its name.

        Names of other libraries are refused, as some use the same name for another tensor: see `sites.names.read`.

        Args:
            text: the name, such as ``"resid_post.12"``, ``"model.layers.3.mlp.output#1"`` for the second tensor of a
                module's output, or ``"resid_post.12|center"``; a `Site` is returned unchanged.

        Returns:
            The site, whose `str` is the name.

        Raises:
            SiteError: if the name does not follow the grammar; the message lists close matches.
        """
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SiteError(f"A site is named by a string, not by {text!r}. {_HELP}")
        bare, *rest = text.split("|")
        head, dot, last = bare.rpartition(".")
        port, hash_, number = last.partition("#")
        if bare in GLOBAL:
            site = cls(bare)
        elif dot and port in PORTS and _MODULE_PATH.fullmatch(head) and not hash_:
            site = cls(head, port=port)
        elif dot and port in PORTS and _MODULE_PATH.fullmatch(head) and _INTEGER.fullmatch(number):
            site = cls(head, port=port, index=int(number))
        elif head in LAYERED and _INTEGER.fullmatch(last):
            site = cls(head, layer=int(last))
        else:
            raise SiteError(_explain_invalid(bare, head, last))
        return site.transformed(*map(Transform.parse, rest))

    @property
    def is_path(self) -> bool:
        """Whether this is a module path rather than a semantic name."""
        return self.port is not None

    @property
    def bare(self) -> Site:
        """The site without transforms."""
        return dataclasses.replace(self, transforms=()) if self.transforms else self

    def transformed(self, *more: Transform) -> Site:
        """Return the site with further transforms after its own."""
        return dataclasses.replace(self, transforms=(*self.transforms, *more)) if more else self

    def __str__(self) -> str:
        """Return the name that `parse` reads."""
        if self.port is not None:
            bare = f"{self.name}.{self.port}" + ("" if self.index is None else f"#{self.index}")
        else:
            bare = self.name if self.layer is None else f"{self.name}.{self.layer}"
        return "|".join((bare, *map(str, self.transforms)))


def _is_count(number: object) -> bool:
    """Whether this is an integer from 0; True is an `int` in Python, but not accepted."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _explain_invalid(text: str, head: str, last: str) -> str:
    """Return why a name is not in the grammar, and what to write instead."""
    if text in LAYERED:
        return f"The site {text!r} needs a layer number, such as '{text}.0'."
    if head in GLOBAL:
        return f"The site {head!r} takes no layer, so {text!r} is not a site; write {head!r}."
    if head in LAYERED:
        return f"{last!r} in the site {text!r} is not a layer number; write a count from zero, such as '{head}.0'."
    if last.partition("#")[0] in PORTS and "#" in last:
        return f"{last!r} in the site {text!r} is not a tensor index; write a count from zero, such as 'output#1'."
    port = did_you_mean(last, PORTS) if head else ""
    explained = "" if port else explain(text)
    if explained:
        return f"{text!r} is not a site: it is {explained}; sites.read_name() reads other libraries' names. {_HELP}"
    layered = _LAYER.match(text)
    stem, layer = layered.groups() if layered else (text, "")
    close = did_you_mean(stem, (*LAYERED, *GLOBAL)) or port
    best = difflib.get_close_matches(stem, LAYERED, n=1) if layer else []
    if best:
        close = (
            f" Did you mean '{stem}.{layer}'?" if stem in LAYERED else f"{close} With its layer: '{best[0]}.{layer}'."
        )
    return f"{text!r} is not a site.{close} {_HELP}"
