"""The temporal SAE, section 3 of arXiv 2511.01836, with the scales and the epsilon of its authors' code.

The tokens are one sequence.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from . import Array, Parameters, centred, relu
from . import decode as written_by


def settings(random: Random, d_sae: int) -> dict[str, Any]:
    """Draw the attention's shape; the output is at the input's site."""
    heads = random.choice([heads for heads in range(1, d_sae + 1) if d_sae % heads == 0])
    rest = d_sae // heads
    return {
        "d_out": None,
        "site_out": None,
        "skip_connection": False,
        "heads": heads,
        "bottleneck": random.choice([each for each in range(1, rest + 1) if rest % each == 0]),
        "attention_layers": random.randint(0, 2),
        "scaling_factor": random.choice([1.0, 0.03]),
        "k": random.choice([None, 1, random.randint(1, d_sae), d_sae]),
    }


def softmax(values: Array) -> Array:
    """Return positive weights that add up to one."""
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def predict(x: Array, p: Parameters, config: Any) -> tuple[Array, Array]:
    """Return the unpredicted residual ``[tokens, d_in]`` and the predicted codes ``[tokens, d_sae]``."""
    d, heads = x.shape[-1], config.heads
    left, predicted = centred(config.scaling_factor * x, p, config), np.zeros((len(x), len(p["W_dec"])))
    for layer in range(config.attention_layers):
        w = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"attention.{layer}.")}
        codes = relu(left @ p["W_enc_T"].T / (4 * d))
        earlier = np.zeros_like(codes)
        earlier[1:] = codes[:-1]
        query, key, value = (
            part @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            for name, part in (("query", codes), ("key", earlier), ("value", earlier))
        )
        width, value_width = query.shape[1] // heads, value.shape[1] // heads
        for token in range(len(x)):
            mixed = []
            for head in range(heads):
                own = slice(head * width, (head + 1) * width)
                weights = softmax(key[: token + 1, own] @ query[token, own] / np.sqrt(width))
                mixed.append(weights @ value[: token + 1, head * value_width : (head + 1) * value_width])
            code = relu(np.concatenate(mixed) @ w["output.weight"].T + w["output.bias"])
            written = code @ p["W_dec"]
            share = written @ left[token] / (np.linalg.norm(written) + 1e-6) ** 2
            predicted[token] += share * code
            left[token] = left[token] - share * written
    return left, predicted


def encode(x: Array, p: Parameters, config: Any) -> Array:
    """Return the novel codes."""
    novel = relu(predict(x, p, config)[0] @ p["W_enc_T"].T / (4 * x.shape[-1]))
    for row in novel:
        row[np.argsort(-row, kind="stable")[config.k or len(row) :]] = 0
    return novel


def decode(latents: Array, x: Array, p: Parameters, config: Any) -> Array:
    """Return the reconstruction from the novel and the predicted codes."""
    return written_by(latents + predict(x, p, config)[1], x, p, config) / config.scaling_factor


def objective(x: Array, target: Array, p: Parameters, config: Any, *, coefficient: float, power: float) -> None:
    """Return None: it is trained on whole sequences, which the package does not support."""
