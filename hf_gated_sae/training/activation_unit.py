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

_WRITES = frozenset({"W_dec", "W_skip"})
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
    """Return the SAE's own tensors that change with the unit, by name.

    These are vectors measured in it; of a transcoder, whose input and output have units of their own, the matrices
    that write as well.
    """
    names = _WRITES if sae.config.is_transcoder else frozenset()
    return {name: tensor for name, tensor in sae.state_dict().items() if name in names or carries_unit(name)}


@torch.no_grad()
def change_unit(sae: SAEModel, factor: float, factor_out: float | None = None) -> None:
    """Change the unit in place: afterwards ``sae(factor * x) == factor * sae_before(x)``, for latents as well.

    A transcoder's latents are measured in the unit of its input; with `factor_out`, what it writes is
    ``factor_out * sae_before(x)``.

    Args:
        sae: any architecture that is homogeneous.
        factor: how many new units make an old one; positive.
        factor_out: the same for what a transcoder writes; `factor` by default.

    Raises:
        InputError: if a factor is not positive, a tensor's unit is not known, the architecture is not homogeneous, or
            input and output do not have units of their own.
    """
    factor_out = factor if factor_out is None else factor_out
    if not sae.homogeneous and (factor, factor_out) != (1, 1):
        raise InputError(
            f"A {type(sae).__name__} computes another function in another unit; train it with activation_scale='none'."
        )
    for each in (factor, factor_out):
        if not 0 < each < float("inf"):
            raise InputError(f"The factor between two units is {each}; expected a positive number.")
    if factor != factor_out:
        require_two_units(sae)
    for name, tensor in unit_tensors(sae).items():
        if name in _WRITES:
            tensor.mul_(factor_out / factor)
        else:
            tensor.mul_(factor_out if name == "b_dec" else factor)


def require_two_units(sae: SAEModel) -> None:
    """Raise unless what an SAE reads and what it writes can be measured in different units.

    Raises:
        InputError: saying why not.
    """
    if not sae.config.is_transcoder or sae.tied:
        raise InputError(f"This {type(sae).__name__} writes where it reads, and there is one unit for both.")
    if sae.config.apply_b_dec_to_input:
        raise InputError(
            "This transcoder subtracts b_dec, which is measured in the unit of its output, from its input: train it "
            "with activation_scale='none', or build it with apply_b_dec_to_input=False."
        )
