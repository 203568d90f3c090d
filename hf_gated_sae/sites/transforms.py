"""Transforms of a site, ``resid_post.12|center``: ``y = T(x)`` is read, and a change of ``y`` is written to ``x``.

A changed value ``y'`` writes ``x' = x + (y' - y) * factor``. The factor, one number per token of the call, scales a
difference back to that of ``x``: a transform is a normalisation of each token, as in `functional.normalization`, and
only the difference is transformed back. So ``y' = y`` leaves x bit-identical, and a subtracted mean stays in ``x``.
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
"""Numbers from this one to its inverse, and their inverses, are neither zero nor infinite nor denormal in float32."""

Apply = Callable[[Tensor, float], tuple[Tensor, Tensor | float]]
"""Takes activations and the transform's value; returns the transformed ones, and the factor of a difference."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Kind(NamedTuple):
    """One transform of the grammar.

    Attributes:
        apply: the transform; None if it depends on the model: `SiteMap` then replaces it by another.
        takes: name of the value after ``=``, for messages; empty if there is none.
        default: the value if none is given; None if it is required.
    """

    apply: Apply | None
    takes: str = ""
    default: float | None = 0.0


def _normalized(normalization: Callable[[Tensor, float], TokenNormalization]) -> Apply:
    def apply(x: Tensor, value: float) -> tuple[Tensor, Tensor | float]:
        found = normalization(x, value)
        return found.apply(x), found.scale

    return apply


def _scale(x: Tensor, value: float) -> tuple[Tensor, Tensor | float]:
    return x * value, 1 / value


TRANSFORMS: Mapping[str, Kind] = {
    **{name: Kind(_normalized(NORMALIZATIONS[name])) for name in ("center", "layer_norm", "unit_norm")},
    **{
        name: Kind(_normalized(NORMALIZATIONS[name]), "the epsilon under the root", DEFAULT_EPS)
        for name in ("rms_norm", "standardize")
    },
    "scale": Kind(_scale, "a factor", None),
    NORM_NO_GAIN: Kind(None),
}
"""Transforms by name. ``norm_no_gain`` is the model's own norm that reads the site, before its gain and bias: the map
of a model's sites replaces it by ``rms_norm`` or ``standardize`` with the proven epsilon."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One transform of a site; hashable, and `str` returns it as text.

    Args:
        name: one of `TRANSFORMS`.
        value: the value after ``=``; None if there is none.
    """

    name: str
    value: float | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that are not in the grammar.

        Raises:
            SiteError: if the name is unknown, or the value is missing, superfluous, or cannot be undone.
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
        usable = SMALLEST <= abs(value) <= 1 / SMALLEST  # the arithmetic is in float32
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
            SiteError: if it is not a transform; the message lists close matches.
        """
        name, equals, value = text.partition("=")
        if not text:
            raise SiteError(f"Unknown transform '': there is no name after '|'; write one of {', '.join(TRANSFORMS)}.")
        if equals and not _NUMBER.fullmatch(value):
            raise SiteError(f"{value!r} in the transform {text!r} is not a number, such as in 'scale=0.5'.")
        return cls(name, float(value) if equals else None)

    def __str__(self) -> str:
        """Return the name that `parse` reads."""
        return self.name if self.value is None else f"{self.name}={str(self.value).removesuffix('.0')}"


def _shortest(value: float) -> float:
    """Return the number with the fewest digits that is equal in float32, for a float32 number; else the number itself.

    An epsilon of 1e-05 that was stored in float32 is 9.999999747378752e-06; in float32, in which it is used, both are
    equal.

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
    """Transformed activations, and how a change of them is written back.

    Attributes:
        raw: the activations ``x`` ``[..., width]``.
        value: the transformed ones, ``y = T(x)``, in the dtype of `raw`.
        factor: the factor of a difference of `value` when it is written, ``[..., 1]`` or one number.
    """

    raw: Tensor
    value: Tensor
    factor: Tensor | float

    def written(self, new: Tensor) -> Tensor:
        """Return ``x + (new - y) * factor``, in float32 or wider; bitwise `raw` wherever `new` equals `value`."""
        wide = torch.promote_types(_wide(self.raw.dtype), new.dtype)
        value, new = self.value.to(wide), new.to(wide)
        # Subtracting a difference whose zeros are +0.0 keeps even -0.0 unchanged.
        back = (value - new) * self.factor + 0.0
        # Unchanged infinities, or an infinite factor, give NaN instead of 0. Only these are set to 0: setting all
        # unchanged elements would remove the gradient of a parameter that is still zero.
        unchanged = (value == new) | (value.isnan() & new.isnan())
        return self.raw.to(wide) - back.masked_fill(back.isnan() & unchanged, 0.0)


def view(x: Tensor, transforms: Iterable[Transform]) -> View:
    """Apply transforms to activations, in the given order.

    Args:
        x: activations ``[..., width]`` of any floating dtype.
        transforms: transforms that do not depend on the model.

    Returns:
        The transformed activations, and how a change of them is written; without transforms, the same tensor.

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
        assert given is not None  # otherwise the transform is refused on construction
        value, back = kind.apply(value.to(_wide(x.dtype)), given)
        factor = factor * back
    return View(x, value.to(x.dtype), factor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
