"""Checks of the arguments of interventions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ..errors import InputError
from .positions import integers, shorten


def latent_list(owner: object, latents: object) -> tuple[int, ...]:
    """Return latent indices without repetitions, in the given order.

    Raises:
        InputError: if they are not whole numbers.
    """
    found = integers(latents)
    if found is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(latents)}; expected indices of latents, such as [3, 7]."
        )
    return tuple(dict.fromkeys(found))


PerRow: TypeAlias = "float | tuple[float, ...]"
"""A number, or one for each row of the batch."""


def latent_values(owner: object, values: object) -> dict[int, float]:
    """Return a copy of numbers by latent.

    Raises:
        InputError: if it is not a mapping, a key is not a whole number, or a value is not finite.
    """
    found = latent_values_per_row(owner, values)
    for latent, value in found.items():
        if isinstance(value, tuple):
            raise InputError(
                f"{type(owner).__name__} was given {shorten(value)} for latent {latent}; expected a finite number."
            )
    return cast("dict[int, float]", found)


def latent_values_per_row(owner: object, values: object) -> dict[int, PerRow]:
    """Return a copy of values by latent, each one number, or one number for each row.

    Raises:
        InputError: if it is not a mapping, a key is not a whole number, a value is not finite, or the latents have
            values for different numbers of rows.
    """
    latents = integers(values.keys()) if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or latents is None:
        raise InputError(
            f"{type(owner).__name__} was given {shorten(values)}; expected numbers by latent, such as {{3: 1.5}}."
        )
    found = {
        latent: number_per_row(owner, f"for latent {latent}", value)
        for latent, value in zip(latents, values.values(), strict=True)
    }
    lengths = sorted({len(value) for value in found.values() if isinstance(value, tuple)})
    if len(lengths) > 1:
        raise InputError(
            f"{type(owner).__name__} was given numbers for {' and for '.join(map(str, lengths))} rows; expected one "
            "for each row of the batch, or one number for all of them."
        )
    return found


def number_per_row(owner: object, what: str, value: object) -> PerRow:
    """Return a number, or a tuple with one for each row of the batch.

    Args:
        owner: the intervention, for messages.
        what: the argument, for messages, such as ``"as strength"``.
        value: a number, or a sequence of them, or a tensor ``[B]``.

    Raises:
        InputError: if it is anything else, or not finite.
    """
    if isinstance(value, Tensor):
        value = value.tolist() if value.ndim <= 1 else value
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    given = tuple(cast("Sequence[object]", value)) if several else (value,)
    for each in given:
        if not isinstance(each, numbers.Real) or isinstance(each, bool) or not math.isfinite(each):
            raise InputError(
                f"{type(owner).__name__} was given {shorten(each)} {what}; expected a finite number"
                f"{' for each row' if several else ', or a list with one for each row of the batch'}."
            )
    if not given:
        raise InputError(f"{type(owner).__name__} was given an empty list {what}; expected one number for each row.")
    found = tuple(float(cast("float", each)) for each in given)
    return found if several else found[0]


def tensor_of(owner: object, values: object, expected: str, axes: Sequence[int], *, finite: bool = True) -> Tensor:
    """Return a copy of a tensor, or of nested lists of numbers.

    Args:
        owner: the intervention, for messages.
        values: the argument.
        expected: the expected argument, for messages, such as ``"a vector [d]"``.
        axes: accepted numbers of axes.
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
