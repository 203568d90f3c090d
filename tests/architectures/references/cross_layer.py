"""Cross-layer transcoders and weakly causal crosscoders, both of transformer-circuits.pub.

Ameisen et al. 2025, "Circuit Tracing" (sums over source layers, JumpReLU); Lindsey et al. 2024, "Sparse Crosscoders"
(an L1 penalty weighted by decoder norms, which are summed over layers). Skip connections: Paulo et al. 2025
(arXiv 2501.18823).
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from . import Array, Parameters, Terms, relu
from .jumprelu import jump


def settings(random: Random, d_sae: int) -> dict[str, Any]:
    """Draw sites, their numbers of latents, and whether the output is at other sites than the input."""
    read = random.randint(1, min(3, d_sae))
    cuts = sorted(random.sample(range(1, d_sae), read - 1))
    sites = [f"resid_mid.{layer}" for layer in range(read)]
    found: dict[str, Any] = {
        "site": None,
        "site_out": None,
        "sites": sites,
        "latents_per_site": [end - start for start, end in zip([0, *cuts], [*cuts, d_sae], strict=True)],
        "activation": random.choice(["relu", "jumprelu"]),
    }
    if random.random() < 0.5:  # a crosscoder
        return {**found, "d_out": None}
    outputs = [f"mlp_out.{layer}" for layer in range(read + random.randint(0, 2))]
    return {**found, "sites_out": outputs, "apply_b_dec_to_input": False}


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return the latents of one source site after the other."""
    latents, first = [], 0
    for source, number in enumerate(config.latents_per_site):
        read = x[:, source] - p["b_dec"][source] if config.apply_b_dec_to_input else x[:, source]
        own = slice(first, first + number)
        z = read @ p[f"encoders.{source}"].T + p["b_enc"][own]
        latents.append(relu(z) if config.activation == "relu" else jump(z, p["threshold"][own]))
        first += number
    return np.concatenate(latents, -1)


def decode(latents: Array, x: Array, p: Parameters, config: Any) -> Array:
    """Add up what every latent writes at its own output and at all later ones, one latent after the other."""
    output = np.tile(p["b_dec"], (len(x), 1, 1))
    latent = 0
    for source in range(len(config.sites)):
        for vectors in p[f"decoders.{source}"]:
            for later, vector in enumerate(vectors):
                output[:, source + later] += latents[:, latent, None] * vector
            latent += 1
        if config.skip_connection:
            output[:, source] += x[:, source] @ p[f"skips.{source}"].T
    return output


def objective(
    x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float
) -> Terms | None:
    """Return ``sum_m |x_m - y_m|^2`` and ``lambda sum_i f_i sum_m |W_dec,i,m|`` of a crosscoder, otherwise None."""
    if config.sites != config.sites_out:
        return None
    latents = encode(x, p, config)
    error = (target - decode(latents, x, p, config)) ** 2
    paid = [
        sum(float(np.linalg.norm(vector)) for vector in vectors)
        for source in range(len(config.sites))
        for vectors in p[f"decoders.{source}"]
    ]
    return {
        "reconstruction": float(error.sum((-2, -1)).mean()),
        "sparsity": coefficient * float((latents @ np.array(paid)).mean()),
    }
