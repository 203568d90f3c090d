"""Decoder rows of exactly unit norm, as the paper's objective needs them.

Before a step the part of the gradient that would only change a row's length is removed, so that Adam's moments do not
count it; after the step the rows are renormalised.

Source: Bricken et al. 2023; Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from ..functional import remove_parallel_component, unit_norm_rows

TOLERANCE = 1e-2
"""How far from 1 a norm may be by rounding alone, in half precision too."""


def have_unit_norm(rows: Tensor) -> bool:
    """Whether rows ``[d_sae, d_out]`` have unit norm, to rounding."""
    return bool(((rows.detach().norm(dim=-1) - 1).abs() <= TOLERANCE).all())


def normalise_first(rows: Tensor, *, expected: bool) -> None:
    """Normalise the rows that training starts from, and warn if that changes what the SAE computes.

    Args:
        rows: decoder ``[d_sae, d_out]``.
        expected: whether nobody is surprised, as the SAE is new.
    """
    if not expected and not have_unit_norm(rows):
        norms = rows.detach().norm(dim=-1)
        warnings.warn(
            f"The decoder rows have norms of {norms.min():.3g} to {norms.max():.3g} and are brought to 1, which "
            "changes what this SAE computes; pass unit_norm_decoder=False to train it as it is.",
            UserWarning,
            stacklevel=2,
        )
    unit_norm_rows(rows)


def before_step(rows: Tensor) -> None:
    """Remove the part of the rows' gradient that is parallel to them."""
    if rows.grad is not None:
        remove_parallel_component(rows.grad, rows)


def after_step(rows: Tensor) -> None:
    """Renormalise the rows, unless they do not learn."""
    if rows.requires_grad:
        unit_norm_rows(rows)
