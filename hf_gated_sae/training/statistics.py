"""Statistics of activations that are measured before training: scale, centre and norm limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..functional.geometry import geometric_median
from ..functional.outliers import is_outlier, norm_limit, norms

CENTRES = ("mean", "geometric_median", "zero")


@dataclass(frozen=True)
class ActivationStatistics:
    """Scale and centre of a sample of activations, without its outliers.

    Attributes:
        count: number of activations in the sample, without outliers.
        mean_square_norm: ``E|x|^2``.
        centre: ``[d_in]`` float32.
        norm_limit: activations with a larger norm are outliers; None for no limit.
    """

    count: int
    mean_square_norm: float
    centre: Tensor
    norm_limit: float | None = None

    def scale(self, kind: str) -> float:
        """Return the factor that scales the root mean square norm of the activations to a given value.

        Args:
            kind: ``"unit"`` for 1, ``"sqrt_d_in"`` for the square root of their width, ``"none"`` to leave it.

        Raises:
            InputError: if all of them are zero.
        """
        if kind == "none":
            return 1.0
        if not self.mean_square_norm:
            raise InputError("All sampled activations are zero, so they cannot be scaled; check the site.")
        wanted = self.centre.numel() if kind == "sqrt_d_in" else 1.0
        return float((wanted / self.mean_square_norm) ** 0.5)


@torch.no_grad()
def measure(
    pieces: Iterable[Tensor], *, centre: str = "mean", outlier_multiple: float | None = None
) -> ActivationStatistics:
    """Measure a sample.

    Args:
        pieces: activations ``[n, d_in]``.
        centre: ``"mean"``, ``"geometric_median"`` (the point with the least summed distance, which a few activations
            of enormous norm cannot drag away) or ``"zero"``.
        outlier_multiple: an activation with a norm above this multiple of the median is an outlier; None for no limit.

    Returns:
        The statistics.

    Raises:
        InputError: if there are no activations, or some are not finite.
    """
    if centre not in CENTRES:
        raise unknown_name("centre", centre, CENTRES)
    sample = [piece.float() for piece in pieces if len(piece)]
    if not sample:
        raise InputError("There are no activations to measure; expected at least one.")
    x = torch.cat(sample)
    length = norms(x)
    if not torch.isfinite(length).all():
        bad = int((~torch.isfinite(length)).sum())
        raise InputError(
            f"{bad} of {len(x)} activations are NaN or infinite; expected finite numbers. Run the model in bfloat16 "
            "or float32 instead of float16, and check its weights."
        )
    limit = None if outlier_multiple is None else norm_limit(x, outlier_multiple)
    outlier = is_outlier(x, limit)
    if outlier.any():
        x, length = x[~outlier], length[~outlier]
    return ActivationStatistics(len(x), length.double().square().mean().item(), _centre(x, centre), limit)


def _centre(x: Tensor, kind: str) -> Tensor:
    """Return the centre of ``x [n, d]``."""
    if kind == "zero":
        return torch.zeros_like(x[0])
    return x.mean(0) if kind == "mean" else geometric_median(x)
