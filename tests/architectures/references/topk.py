"""The TopK SAE: Gao et al. 2024 (arXiv 2406.04093), section 2.3.

Ranking by latent times decoder norm: OpenMOSS/Language-Model-SAEs, ``sparsity_include_decoder_norm``. Nested prefixes
of the dictionary: Bussmann et al. 2025 (arXiv 2503.17547).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from . import Array, Parameters, Terms, decode, decoder_norms, pre_latents, relu, squared_error

VARIANTS = [{}, {"prefixes": (0.25, 0.5)}]


def settings(random: Random, d_sae: int) -> dict[str, Any]:
    """Draw `k`, whether there is a ReLU, and the ranking."""
    return {
        "k": random.randint(1, d_sae),
        "rectified": random.random() < 0.5,
        "rank_by_decoder_norm": random.random() < 0.5,
    }


def largest(values: Array, scores: Array, k: int) -> Array:
    """Return the values of each token that have the `k` highest scores, and zeros elsewhere."""
    latents = np.zeros_like(values)
    for token, score in enumerate(scores):
        for latent in sorted(range(len(score)), key=lambda latent: -score[latent])[:k]:
            latents[token, latent] = values[token, latent]
    return latents


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``TopK(W_enc (x - b_pre) + b_enc)``."""
    values = pre_latents(x, p, config)
    if config.rectified:
        values = relu(values)
    return largest(values, values * decoder_norms(p) if config.rank_by_decoder_norm else values, config.k)


def nested_terms(
    latents: Array, x: Array, target: Array, p: Parameters, config: Any, prefixes: Sequence[float]
) -> Terms:
    """Return the squared errors with all latents and with each prefix of them."""
    terms = {"reconstruction": squared_error(target, decode(latents, x, p, config))}
    for share in prefixes:
        first = round(share * latents.shape[-1])
        part = np.concatenate([latents[:, :first], np.zeros_like(latents[:, first:])], -1)
        terms[f"reconstruction_{first}"] = squared_error(target, decode(part, x, p, config))
    return terms


def nested_objective(encode: Callable[[Array, Parameters, Any], Array]) -> Callable[..., Terms]:
    """Return the objective of an encoder: the squared error, and that of every prefix of the latents."""

    def objective(
        x: Array,
        target: Array,
        p: Parameters,
        config: Any,
        *,
        coefficient: float,
        power: float,
        prefixes: Sequence[float] = (),
    ) -> Terms:
        return nested_terms(encode(x, p, config), x, target, p, config, prefixes)

    return objective


objective = nested_objective(encode)
