"""The factors with which SAELens fine-tuned SAEs, a tensor beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Tensors
from ._config_values import flag

FINETUNED = "scaling_factor"
_FLAG = "finetuning_scaling_factor"


def finetuning(
    location: Location, weights: str, cfg: Mapping[str, Any], where: str
) -> Callable[[Tensors], Tensors] | None:
    """Return what is done with the factors ``[d_sae]`` of fine-tuning; None if the file has none.

    Raises:
        CheckpointError: if file and configuration disagree about whether there are factors.
    """
    factors, said = location.tensors(weights).get(FINETUNED), flag(cfg, _FLAG, where, False)
    if factors is None:
        if said:
            raise CheckpointError(
                f"{where} says {_FLAG} = true, and {weights} beside it has no {FINETUNED}: the SAE would need those "
                "factors. Fetch the file again, or say false if they are in the decoder already."
            )
        return None
    if not said and bool((factors.small() != 1).any()):
        raise CheckpointError(
            f"{weights} of {location} holds factors of fine-tuning ({FINETUNED}) that {where.split(' ', 1)[0]} denies "
            f"({_FLAG} is not true): say there whether they are to be used."
        )
    return _finetuned if said else _not_finetuned


def _finetuned(tensors: Tensors) -> Tensors:
    """Multiply the decoder's rows by the factors, which is to multiply latents when they are decoded."""
    factors = tensors.pop(FINETUNED)
    tensors["W_dec"].mul_(factors[:, None].to(tensors["W_dec"].dtype))
    return tensors


def _not_finetuned(tensors: Tensors) -> Tensors:
    """Leave factors out that are all 1."""
    tensors.pop(FINETUNED, None)
    return tensors
