"""Decoder rows of exactly unit norm, as the paper's objective needs them."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..functional import remove_parallel_component, unit_norm_rows

TOLERANCE = 1e-2
"""How far from 1 a norm may be by rounding alone, in half precision too."""


class UnitNormDecoder(TrainerCallback):
    """Keeps every decoder row at unit norm.

    Before a step the part of the gradient that would only change a row's length is removed, so that Adam's moments do
    not count it; after the step the rows are renormalised.

    Source: Bricken et al. 2023; Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix D.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Normalise the rows that training starts from, and warn if that changes what the SAE computes."""
        rows = kwargs["model"].W_dec
        norms = rows.detach().norm(dim=-1)
        if ((norms - 1).abs() > TOLERANCE).any():
            warnings.warn(
                f"The decoder rows have norms of {norms.min():.3g} to {norms.max():.3g} and are brought to 1, which "
                "changes what this SAE computes; pass unit_norm_decoder=False to train it as it is.",
                UserWarning,
                stacklevel=2,
            )
        unit_norm_rows(rows)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the parallel part of the gradient."""
        rows = kwargs["model"].W_dec
        if rows.grad is not None:
            remove_parallel_component(rows.grad, rows)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Renormalise the rows."""
        unit_norm_rows(kwargs["model"].W_dec)
