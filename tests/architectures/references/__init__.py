"""Reference implementations of every architecture, written from the papers and not from the package.

Each file has the name of the architecture's file in ``hf_gated_sae/architectures``, uses only numpy, in float64, and
defines

* ``encode(x, p, config)``: the latents ``[tokens, d_sae]``;
* ``objective(x, target, p, config, *, coefficient, power, **variant)``: the terms of the training objective by name.
  It returns None for a configuration that cannot be trained, which the package must refuse.

It may also define

* ``decode(latents, x, p, config)``, if the one below does not apply;
* ``settings(random, d_sae)``: randomly drawn settings of this architecture, which override the common ones;
* ``VARIANTS``: settings of the objective to test, which together set each of its fields; ``[{}]`` by default.

``x [tokens, *input_shape]`` are activations after the normalisation of each token, ``p`` is the state dict as arrays,
and ``config`` is the configuration, of which only fields are read. `test_equations.py` makes the comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Parameters = dict[str, Array]
Terms = dict[str, float]


def relu(values: Array) -> Array:
    """Return values above zero, and zero for all others."""
    return np.where(values > 0, values, 0.0)


def centred(x: Array, p: Parameters, config: Any) -> Array:
    """Return what the encoder is applied to."""
    return x - p["b_dec"] if config.apply_b_dec_to_input else x


def pre_latents(x: Array, p: Parameters, config: Any) -> Array:
    """Return ``(x - b_dec) @ W_enc + b_enc``."""
    return centred(x, p, config) @ p["W_enc_T"].T + p["b_enc"]


def decode(latents: Array, x: Array, p: Parameters, config: Any) -> Array:
    """Return ``latents @ W_dec + b_dec``, plus ``x @ W_skip.T`` if there is a skip connection."""
    written = latents @ p["W_dec"] + p["b_dec"]
    return written + x @ p["W_skip"].T if config.skip_connection else written


def squared_error(target: Array, output: Array) -> float:
    """Return the mean over tokens of the squared error, summed over the width."""
    return float(((target - output) ** 2).sum(-1).mean())


def decoder_norms(p: Parameters) -> Array:
    """Return the length of each decoder row."""
    return np.sqrt((p["W_dec"] ** 2).sum(-1))


def normalization(x: Array, config: Any) -> tuple[Array, Array, Array]:
    """Return shift, divisor and scale of every token; its normalised form is ``(x - shift) / divisor``.

    An SAE whose output is at its input's site returns ``written * scale + shift``.
    """
    name, width = config.normalization, x.shape[-1]
    mean, square = x.sum(-1, keepdims=True) / width, (x**2).sum(-1, keepdims=True) / width
    spread = ((x - mean) ** 2).sum(-1, keepdims=True)
    zero, one = np.zeros_like(mean), np.ones_like(mean)
    if name == "center":  # TransformerLens, `center_writing_weights`
        return mean, one, one
    if name == "layer_norm":  # openai/sparse_autoencoder, `LN`: unbiased deviation, and 1e-5 outside the root
        deviation = np.sqrt(spread / (width - 1))
        return mean, deviation + 1e-5, deviation
    if name == "unit_norm":  # SAELens, `constant_norm_rescale`
        return zero, np.sqrt(square), np.sqrt(square)
    if name == "rms_norm":  # Zhang and Sennrich 2019 (arXiv 1910.07467)
        return zero, np.sqrt(square + config.normalization_eps), np.sqrt(square + config.normalization_eps)
    if name == "standardize":  # Ba et al. 2016 (arXiv 1607.06450), without gain and bias
        deviation = np.sqrt(spread / width + config.normalization_eps)
        return mean, deviation, deviation
    assert name == "none", f"add the normalisation {name!r} to {__file__}"
    return zero, one, one
