"""Checks of what interventions are given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .positions import integers, shorten


def latent_list(owner: object, latents: object) -> tuple[int, ...]:
    """Return latent indices, each once, in the order given.

    Raises:
        InputError: if they are not whole numbers.
    """
    found = integers(latents)
    if found is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(latents)}; expected indices of latents, such as [3, 7]."
        )
    return tuple(dict.fromkeys(found))


def latent_values(owner: object, values: object) -> dict[int, float]:
    """Return a copy of numbers by latent.

    Raises:
        InputError: if it is no mapping, a key is no whole number, or a value is not finite.
    """
    latents = integers(values.keys()) if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or latents is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(values)}; expected numbers by latent, such as {{3: 1.5}}."
        )
    for latent, value in values.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(
                f"{type(owner).__name__} was given {value!r} for latent {latent}; expected a finite number."
            )
    return {latent: float(value) for latent, value in zip(latents, values.values(), strict=True)}


def finite_number(owner: object, name: str, value: object) -> float:
    """Return a number.

    Raises:
        InputError: if it is none, or not finite.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{type(owner).__name__} was given {name}={shorten(value)}; expected a finite number.")
    return float(value)


def tensor_of(owner: object, values: object, expected: str, axes: Sequence[int], *, finite: bool = True) -> Tensor:
    """Return a copy of a tensor, or of nested lists of numbers.

    Args:
        owner: the intervention that was given it.
        values: what was given.
        expected: what it should be, for messages, such as ``"a vector [d]"``.
        axes: numbers of axes that it may have.
        finite: whether all values must be finite.

    Raises:
        InputError: if it is anything else.
    """
    try:
        found = torch.as_tensor(values).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{type(owner).__name__} was given {shorten(values)}; expected {expected}.") from None
    if found.is_complex() or found.ndim not in axes or not found.numel() or found.dtype == torch.bool:
        raise InputError(
            f"{type(owner).__name__} was given a tensor {list(found.shape)} of {found.dtype}; expected {expected}."
        )
    if finite and not torch.isfinite(found).all():
        raise InputError(f"{type(owner).__name__} was given NaN or infinite values; expected {expected}, all finite.")
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())
