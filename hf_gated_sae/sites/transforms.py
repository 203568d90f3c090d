"""Transforms of a site, ``resid_post.12|center``: what is read is ``y = T(x)``, and what is written is undone into x.

A changed value ``y'`` puts ``x' = x + (y' - y) * factor``, where the factor, one number per token of that call, brings
a difference back into the units of ``x``: a transform is a change of frame, as in `functional.normalization`, and only
the difference is moved. So ``y' = y`` leaves x bit-identical, and centring adds back what it subtracted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SiteError, unknown_name
from ..functional.normalization import NORMALIZATIONS, TokenNormalization

NORM_NO_GAIN = "norm_no_gain"
DEFAULT_EPS = 1e-6
SMALLEST = torch.finfo(torch.float32).tiny
"""Numbers from here to its inverse, and their inverses, are neither zero nor infinite nor denormal in float32."""

Apply = Callable[[Tensor, float], tuple[Tensor, Tensor | float]]
"""Takes activations and the transform's value; returns what is read, and the factor of a difference going back."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Kind(NamedTuple):
    """One transform of the grammar.

    Attributes:
        apply: the transform; None where it depends on the model, which the map of sites then replaces by another.
        takes: what stands behind ``=``, for messages; empty if nothing may.
        default: the value where none is given; None if it must be given.
    """

    apply: Apply | None
    takes: str = ""
    default: float | None = 0.0


def _framed(frame: Callable[[Tensor, float], TokenNormalization]) -> Apply:
    def apply(x: Tensor, value: float) -> tuple[Tensor, Tensor | float]:
        found = frame(x, value)
        return found.apply(x), found.scale

    return apply


def _scale(x: Tensor, value: float) -> tuple[Tensor, Tensor | float]:
    return x * value, 1 / value


TRANSFORMS: Mapping[str, Kind] = {
    **{name: Kind(_framed(NORMALIZATIONS[name])) for name in ("center", "layer_norm", "unit_norm")},
    **{
        name: Kind(_framed(NORMALIZATIONS[name]), "the epsilon under the root", DEFAULT_EPS)
        for name in ("rms_norm", "standardize")
    },
    "scale": Kind(_scale, "a factor", None),
    NORM_NO_GAIN: Kind(None),
}
"""Transforms by name. ``norm_no_gain`` is the model's own norm that reads the site, before its gain and bias: the map
of a model's sites replaces it by ``rms_norm`` or ``standardize`` with the proven epsilon."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One transform of a site, hashable, and written by `str`.

    Args:
        name: one of `TRANSFORMS`.
        value: what stands behind ``=``; None for nothing.
    """

    name: str
    value: float | None = None

    def __post_init__(self) -> None:
        """Refuse what the grammar does not have.

        Raises:
            SiteError: if the name is unknown, or the value missing, superfluous, or not to be undone.
        """
        if self.name not in TRANSFORMS:
            raise unknown_name("transform", self.name, TRANSFORMS, error=SiteError)
        kind = TRANSFORMS[self.name]
        if self.value is None:
            if kind.default is None:
                raise SiteError(f"The transform {self.name!r} needs {kind.takes}, such as '{self.name}=0.5'.")
            return
        if not kind.takes:
            raise SiteError(f"The transform {self.name!r} takes no value; write '|{self.name}'.")
        value = float(self.value)
        usable = SMALLEST <= abs(value) <= 1 / SMALLEST  # also of the arithmetic, which is in float32
        if not usable or (kind.default is not None and value < 0):
            sign = "" if kind.default is None else "positive, "
            raise SiteError(
                f"'{self.name}={value}' cannot be undone: {kind.takes} must be {sign}finite and not zero, in float32: "
                f"from {SMALLEST:.2g} to {1 / SMALLEST:.2g} in size."
            )
        object.__setattr__(self, "value", _shortest(value))

    @classmethod
    def parse(cls, text: str) -> Transform:
        """Read a transform from its name, such as ``"center"`` or ``"scale=0.5"``.

        Raises:
            SiteError: if it is no transform; the message lists close matches.
        """
        name, equals, value = text.partition("=")
        if not text:
            raise SiteError(f"Unknown transform '': nothing stands behind '|'; write one of {', '.join(TRANSFORMS)}.")
        if equals and not _NUMBER.fullmatch(value):
            raise SiteError(f"{value!r} in the transform {text!r} is not a number, such as in 'scale=0.5'.")
        return cls(name, float(value) if equals else None)

    def __str__(self) -> str:
        """Return the name that `parse` reads."""
        return self.name if self.value is None else f"{self.name}={str(self.value).removesuffix('.0')}"


def _shortest(value: float) -> float:
    """Return the number of fewest digits that is the same in float32, if it is one of float32; else the number itself.

    A model's epsilon that was stored in float32 is 9.999999747378752e-06, and means 1e-05: in float32, in which the
    arithmetic is, both are the same.

    >>> _shortest(9.999999747378752e-06), _shortest(0.1)
    (1e-05, 0.1)
    """
    if _in_float32(value) != value:
        return value
    return next(short for digits in range(1, 10) if _in_float32(short := float(f"{value:.{digits}g}")) == value)


def _in_float32(value: float) -> float:
    [found] = struct.unpack("f", struct.pack("f", value))
    return float(found)


class View(NamedTuple):
    """Activations seen through transforms.

    Attributes:
        raw: the activations ``x`` ``[..., width]``.
        value: what is read, ``y = T(x)``, in the dtype of `raw`.
        factor: what a difference of `value` is multiplied by on its way back, ``[..., 1]`` or one number.
    """

    raw: Tensor
    value: Tensor
    factor: Tensor | float

    def written(self, new: Tensor) -> Tensor:
        """Return ``x + (new - y) * factor``, in float32 at least; bitwise `raw` wherever `new` is `value`."""
        wide = torch.promote_types(_wide(self.raw.dtype), new.dtype)
        value, new = self.value.to(wide), new.to(wide)
        # In this direction, and with the sign of a zero difference taken off, even -0.0 stays what it was.
        back = (value - new) * self.factor + 0.0
        # A difference of infinities, or times an infinite factor, is no zero by itself. Only these are put right: were
        # all that is unchanged, a new parameter at zero would get no gradient.
        unchanged = (value == new) | (value.isnan() & new.isnan())
        return self.raw.to(wide) - back.masked_fill(back.isnan() & unchanged, 0.0)


def view(x: Tensor, transforms: Iterable[Transform]) -> View:
    """Look at activations through transforms, the first one first.

    Args:
        x: activations ``[..., width]`` of any floating dtype.
        transforms: as they stand in a site, none of which depends on the model any more.

    Returns:
        What is read, and how a change of it is written; without transforms, the very tensor.

    Raises:
        SiteError: if a transform depends on the model.

    >>> seen = view(torch.tensor([1.0, 3.0]), [Transform("center"), Transform("scale", 2.0)])
    >>> seen.value
    tensor([-2.,  2.])
    >>> seen.written(seen.value + 1)
    tensor([1.5000, 3.5000])
    """
    value: Tensor = x
    factor: Tensor | float = 1.0
    for transform in transforms:
        kind = TRANSFORMS[transform.name]
        if kind.apply is None:
            raise SiteError(f"The transform '{transform}' depends on the model: resolve the site in it first.")
        given = transform.value if transform.value is not None else kind.default
        assert given is not None  # or the transform would have been refused
        value, back = kind.apply(value.to(_wide(x.dtype)), given)
        factor = factor * back
    return View(x, value.to(x.dtype), factor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
