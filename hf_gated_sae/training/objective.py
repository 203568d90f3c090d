"""Calling the training objective through whatever transformers wrapped around the SAE."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modeling import SAEModel, TrainingLoss


def training_loss(wrapper: nn.Module, sae: SAEModel, x: Tensor, sparsity_coefficient: float) -> TrainingLoss:
    """Return ``sae.training_loss(x)``, called so that gradients are synchronised between processes.

    Data-parallel and sharding wrappers act on what passes through their own ``forward``; the SAE's ``forward`` is
    therefore replaced by its objective for the time of the call.

    Args:
        wrapper: the SAE itself, or a module around it.
        sae: the SAE inside.
        x: activations ``[n, d_in]``.
        sparsity_coefficient: lambda.

    Returns:
        The objective, term by term.
    """
    if wrapper is sae:
        return sae.training_loss(x, sparsity_coefficient=sparsity_coefficient)
    own = sae.__dict__.get("forward")  # accelerate replaces forward on the instance for mixed precision

    def objective(x: Tensor) -> Any:
        loss = sae.training_loss(x, sparsity_coefficient=sparsity_coefficient)
        return {
            "total": loss.total,
            "terms": loss.terms,
            "reconstruction": loss.reconstruction,
            "latents": loss.latents,
        }

    sae.forward = objective  # type: ignore[method-assign]  # undone below
    try:
        return TrainingLoss(**wrapper(x))
    finally:
        if own is None:
            del sae.forward
        else:
            sae.forward = own  # type: ignore[method-assign]  # as it was
