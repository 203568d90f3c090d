"""The activation unit (the factor activations are divided by), and converting an SAE's weights between units.

Training is easier on activations of a known norm, but a published SAE has to read the model's own activations. Most
architectures are positively homogeneous in their input together with their biases and thresholds, so a change of unit
rescales only those vectors: matrices keep their values, decoder rows their unit norm, and latents are measured in the
activation unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..modeling import SAEModel

_OUTPUT_MATRICES = frozenset({"W_dec", "W_skip"})
_MEASURED_IN_ACTIVATIONS = frozenset({"threshold", "max_activation", "mean_activation"})


def carries_unit(name: str) -> bool:
    """Return whether a tensor is measured in the activation unit.

    Biases (``b_...``), thresholds and recorded activations are. Matrices (``W_...``), log ratios (``r_...``) are not.

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
        f"The name of the tensor {name!r} does not say whether it scales with the activation unit. Name biases "
        f"b_..., matrices W_..., log ratios r_..., or use one of {', '.join(sorted(_MEASURED_IN_ACTIVATIONS))}; or "
        "train with activation_scale='none'."
    )


def unit_tensors(sae: SAEModel) -> dict[str, Tensor]:
    """Return the SAE's tensors that change with the activation unit, by name.

    These are the vectors measured in it and, for a transcoder, whose input and output have separate units, also the
    output matrices.
    """
    names = _OUTPUT_MATRICES if sae.config.is_transcoder else frozenset()
    return {name: tensor for name, tensor in sae.state_dict().items() if name in names or carries_unit(name)}


@torch.no_grad()
def change_unit(sae: SAEModel, factor: float, factor_out: float | None = None) -> None:
    """Change the activation unit in place: afterwards ``sae(factor * x) == factor * sae_before(x)``, latents included.

    A transcoder's latents are measured in the unit of its input; with `factor_out`, its output is
    ``factor_out * sae_before(x)``.

    Args:
        sae: of any homogeneous architecture.
        factor: new units per old unit; positive.
        factor_out: the same for a transcoder's output; `factor` by default.

    Raises:
        InputError: if a factor is not positive, a tensor's unit is not known, the architecture is not homogeneous, or
            input and output share one unit and the factors differ.
    """
    factor_out = factor if factor_out is None else factor_out
    if not sae.homogeneous and (factor, factor_out) != (1, 1):
        raise InputError(
            f"A {type(sae).__name__} is not homogeneous: scaling its activations would change the function that it "
            "computes. Train it with activation_scale='none'."
        )
    for each in (factor, factor_out):
        if not 0 < each < float("inf"):
            raise InputError(f"The factor between two units is {each}; expected a positive number.")
    if factor != factor_out:
        require_two_units(sae)
    for name, tensor in unit_tensors(sae).items():
        if name in _OUTPUT_MATRICES:
            tensor.mul_(factor_out / factor)
        else:
            tensor.mul_(factor_out if name == "b_dec" else factor)


def require_two_units(sae: SAEModel) -> None:
    """Raise unless an SAE's input and output can be measured in different units.

    Raises:
        InputError: with the reason.
    """
    if not sae.config.is_transcoder or sae.tied:
        raise InputError(f"This {type(sae).__name__} reads and writes one site, so both have the same unit.")
    if sae.config.apply_b_dec_to_input:
        raise InputError(
            "This transcoder subtracts b_dec, which is measured in the unit of its output, from its input: train it "
            "with activation_scale='none', or build it with apply_b_dec_to_input=False."
        )
