"""Decoder rows of exactly unit norm, as the paper's objective needs them.

Before a step the part of the gradient that would only change a row's norm is removed, so that it does not enter Adam's
moments; after the step the rows are renormalised.

Source: Bricken et al. 2023; Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from ..functional import remove_parallel_component, unit_norm_rows

TOLERANCE = 1e-2
"""Largest deviation of a norm from 1 that counts as rounding, half precision included."""


def have_unit_norm(rows: Tensor) -> bool:
    """Whether rows ``[d_sae, d_out]`` have unit norm, up to rounding."""
    return bool(((rows.detach().norm(dim=-1) - 1).abs() <= TOLERANCE).all())


def normalise_initial(rows: Tensor, *, expected: bool) -> None:
    """Normalise the initial decoder rows, and warn if that changes the function of a trained SAE.

    Args:
        rows: decoder ``[d_sae, d_out]``.
        expected: do not warn, as the SAE is new.
    """
    if not expected and not have_unit_norm(rows):
        norms = rows.detach().norm(dim=-1)
        warnings.warn(
            f"The decoder rows have norms of {norms.min():.3g} to {norms.max():.3g} and are normalised to 1, which "
            "changes the output of this SAE; pass unit_norm_decoder=False to keep their norms.",
            UserWarning,
            stacklevel=2,
        )
    unit_norm_rows(rows)


def before_step(rows: Tensor) -> None:
    """Remove the part of the rows' gradient that is parallel to them."""
    if rows.grad is not None:
        remove_parallel_component(rows.grad, rows)


def after_step(rows: Tensor) -> None:
    """Renormalise the rows, if they are trained."""
    if rows.requires_grad:
        unit_norm_rows(rows)
