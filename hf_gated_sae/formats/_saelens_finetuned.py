"""SAELens's fine-tuning factors, a tensor beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Tensors
from ._config_values import flag

FINETUNED = "scaling_factor"
_FLAG = "finetuning_scaling_factor"


def finetuning_step(
    location: Location, weights: str, cfg: Mapping[str, Any], where: str
) -> Callable[[Tensors], Tensors] | None:
    """Return the function that applies or drops the factors ``[d_sae]`` of fine-tuning; None if there are none.

    Raises:
        CheckpointError: if file and configuration disagree about whether there are factors.
    """
    factors, stated = location.tensors(weights).get(FINETUNED), flag(cfg, _FLAG, where, False)
    if factors is None:
        if stated:
            raise CheckpointError(
                f"{where} has {_FLAG} = true, and {weights} beside it has no {FINETUNED}: the SAE needs those "
                "factors. Fetch the file again, or set false if they are in the decoder already."
            )
        return None
    if not stated and bool((factors.small() != 1).any()):
        raise CheckpointError(
            f"{weights} of {location} holds fine-tuning factors ({FINETUNED}), but {_FLAG} in "
            f"{where.split(' ', 1)[0]} is not true: set it there to true to apply them, or remove the tensor."
        )
    return _finetuned if stated else _not_finetuned


def _finetuned(tensors: Tensors) -> Tensors:
    """Multiply the decoder's rows by the factors, which scales the latents on decoding."""
    factors = tensors.pop(FINETUNED)
    tensors["W_dec"].mul_(factors[:, None].to(tensors["W_dec"].dtype))
    return tensors


def _not_finetuned(tensors: Tensors) -> Tensors:
    """Drop factors that are all 1."""
    tensors.pop(FINETUNED, None)
    return tensors
