"""Finding the name of what is no longer a number, once a run has been seen to diverge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .trainee import Trainee


def find_nonfinite(trainees: Iterable[Trainee], inputs: Mapping[str, Tensor], step: int) -> str | None:
    """Return what is NaN or infinite first on the way from the activations to the gradients, in words.

    Args:
        trainees: the SAEs, with the gradients of the step and the weights from before it.
        inputs: the latest batch by site.
        step: number of steps done.

    Returns:
        Such as ``"the gradient of W_dec at latent 17 is nan"``; None if everything is finite.
    """
    for site, x in inputs.items():
        if where := _first_row(x):
            row, value = where
            return f"activation {row} of {len(x)} at {site or 'the given site'} is {value}"
    for trainee in trainees:
        if found := _in_trainee(trainee, inputs, step):
            return f"{found} in the SAE {trainee.name!r}" if trainee.name else found
    return None


def _in_trainee(trainee: Trainee, inputs: Mapping[str, Tensor], step: int) -> str | None:
    sae = trainee.sae
    for name, tensor in sae.named_parameters():
        if where := _first_row(tensor.detach()):
            return f"the parameter {name} at {_row(sae.config.d_sae, tensor, where[0])} is {where[1]}"
    with torch.no_grad():
        loss = trainee.loss(step, *trainee.batch(inputs))
    for name, term in loss.terms.items():
        if not torch.isfinite(term):
            return f"the term {name!r} of the loss is {term.item()}"
    for name, tensor in sae.named_parameters():
        if tensor.grad is not None and (where := _first_row(tensor.grad)):
            return f"the gradient of {name} at {_row(sae.config.d_sae, tensor, where[0])} is {where[1]}"
    return None


def _first_row(tensor: Tensor) -> tuple[int, float] | None:
    """Return the first row that holds something not finite, and that value."""
    finite = torch.isfinite(tensor).reshape(len(tensor), -1)
    rows = (~finite.all(-1)).nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    return row, tensor.reshape(len(tensor), -1)[row][~finite[row]][0].item()


def _row(d_sae: int, tensor: Tensor, row: int) -> str:
    return f"latent {row}" if len(tensor) == d_sae else f"place {row}"
