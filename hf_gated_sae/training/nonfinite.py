"""Finding the first NaN or infinite value of a run that has diverged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .trainee import Trainee


def find_nonfinite(trainees: Iterable[Trainee], inputs: Mapping[str, Tensor], step: int) -> str | None:
    """Describe the first NaN or infinite value on the way from the activations to the loss.

    Args:
        trainees: the SAEs, with the weights from before the step.
        inputs: the latest batch by site.
        step: number of steps done.

    Returns:
        Such as ``"the term 'sparsity' of the loss is inf"``; None if everything is finite.
    """
    with torch.no_grad():  # always of all SAEs: the processes that train together have to compute the same losses
        losses = [(trainee, trainee.loss(step, *trainee.batch(inputs))) for trainee in trainees]
    for site, x in inputs.items():
        if where := _first_row(x):
            row, value = where
            return f"activation {row} of {len(x)} at {site or 'the given site'} is {value}"
    for trainee, loss in losses:
        if (outliers := trainee.outliers(inputs)).all():
            return (
                f"all {len(outliers)} activations of the batch have norms above {trainee.limits} and are left out"
                f"{_of(trainee)}: use a larger activation_batch_size or outlier_multiple"
            )
        for name, tensor in trainee.sae.named_parameters():
            if where := _first_row(tensor.detach()):
                return f"the parameter {name} at {_row_name(trainee, tensor, where[0])} is {where[1]}{_of(trainee)}"
        for name, term in loss.terms.items():
            if not torch.isfinite(term):
                return f"the term {name!r} of the loss is {term.item()}{_of(trainee)}"
    return None


def find_nonfinite_gradient(trainees: Iterable[Trainee]) -> str | None:
    """Describe the first NaN or infinite gradient, for a step whose activations, weights and loss are finite.

    Args:
        trainees: the SAEs, with the gradients of the step.

    Returns:
        Such as ``"the gradient of W_dec at latent 17 is nan"``; None if all are finite.
    """
    for trainee in trainees:
        for name, tensor in trainee.sae.named_parameters():
            if tensor.grad is not None and (where := _first_row(tensor.grad)):
                return f"the gradient of {name} at {_row_name(trainee, tensor, where[0])} is {where[1]}{_of(trainee)}"
    return None


def _first_row(tensor: Tensor) -> tuple[int, float] | None:
    """Return the index of the first row with a non-finite value, and that value."""
    finite = torch.isfinite(tensor).reshape(len(tensor), -1)
    rows = (~finite.all(-1)).nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    return row, tensor.reshape(len(tensor), -1)[row][~finite[row]][0].item()


def _row_name(trainee: Trainee, tensor: Tensor, row: int) -> str:
    held = trainee.sae.config.d_sae
    return f"latent {row + trainee.grid.latents.rank * held}" if len(tensor) == held else f"index {row}"


def _of(trainee: Trainee) -> str:
    return f" in the SAE {trainee.name!r}" if trainee.name else ""
