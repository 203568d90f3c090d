"""The ReLU SAE with an L1 penalty: Bricken et al. 2023, "Towards Monosemanticity".

Penalty weighted by decoder norms: Conerly et al. 2024, "Update on how we train SAEs".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Array, Parameters, Terms, decode, decoder_norms, pre_latents, relu, squared_error

VARIANTS = [{}, {"weighted_by_decoder_norm": True}]


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``f = ReLU(W_e (x - b_d) + b_e)``."""
    return relu(pre_latents(x, p, config))


def penalty(latents: Array, p: Parameters, coefficient: float, power: float, weighted: bool) -> float:
    """Return ``lambda * sum f_i ** power``, averaged over tokens, with ``f_i |W_d,i|`` for ``f_i`` if weighted."""
    paid = latents * decoder_norms(p) if weighted else latents
    return coefficient * float((paid**power).sum(-1).mean())


def penalised_objective(encode: Callable[[Array, Parameters, Any], Array]) -> Callable[..., Terms]:
    """Return the objective of an encoder: the squared error and the penalty, optionally weighted by decoder norms."""

    def objective(
        x: Array,
        target: Array,
        p: Parameters,
        config: Any,
        *,
        coefficient: float,
        power: float,
        weighted_by_decoder_norm: bool = False,
    ) -> Terms:
        latents = encode(x, p, config)
        return {
            "reconstruction": squared_error(target, decode(latents, x, p, config)),
            "sparsity": penalty(latents, p, coefficient, power, weighted_by_decoder_norm),
        }

    return objective


objective = penalised_objective(encode)
