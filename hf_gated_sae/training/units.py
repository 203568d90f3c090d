"""The unit that activations are measured in, and how an SAE's weights follow when it changes.

Training is easier on activations of a known size, but a published SAE has to read what the model really produces.
Most architectures are a positively homogeneous function of its input together with its biases and thresholds, so a
change of unit touches only those vectors: matrices keep their values, decoder rows their unit norm, and latents are
measured in the activations' own unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..modeling import SAEModel

_MEASURED_IN_ACTIVATIONS = frozenset({"threshold", "max_activation", "mean_activation"})


def carries_unit(name: str) -> bool:
    """Tell whether a tensor is measured in the unit of the activations.

    Biases (``b_...``), thresholds and recorded activations are; matrices (``W_...``) and log ratios (``r_...``) not.

    Args:
        name: the tensor's name in the SAE's state.

    Raises:
        InputError: for a name that follows none of these conventions.

    >>> carries_unit("b_gate"), carries_unit("r_mag")
    (True, False)
    """
    if name.startswith("b_") or name in _MEASURED_IN_ACTIVATIONS:
        return True
    if name.startswith(("W_", "r_")):
        return False
    raise InputError(
        f"It is not known how the tensor {name!r} follows a change of the activations' unit. Name biases b_..., "
        f"matrices W_..., log ratios r_..., or one of {', '.join(sorted(_MEASURED_IN_ACTIVATIONS))}; or train with "
        "activation_scale='none'."
    )


def unit_tensors(sae: SAEModel) -> dict[str, Tensor]:
    """Return the SAE's own tensors that are measured in the unit of the activations, by name; they are all vectors."""
    return {name: tensor for name, tensor in sae.state_dict().items() if carries_unit(name)}


@torch.no_grad()
def change_unit(sae: SAEModel, factor: float) -> None:
    """Change the unit in place: afterwards ``sae(factor * x) == factor * sae_before(x)``, for latents as well.

    Args:
        sae: any architecture that is homogeneous.
        factor: how many new units make an old one; positive.

    Raises:
        InputError: if `factor` is not positive, a tensor's unit is not known, or the architecture is not homogeneous.
    """
    if not sae.homogeneous and factor != 1:
        raise InputError(
            f"A {type(sae).__name__} computes another function in another unit; train it with activation_scale='none'."
        )
    if not 0 < factor < float("inf"):
        raise InputError(f"The factor between two units is {factor}; expected a positive number.")
    for tensor in unit_tensors(sae).values():
        tensor.mul_(factor)
