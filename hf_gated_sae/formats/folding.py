"""Absorb a layout's conventions into the weights: row-wise in the latents, in place, no copy of a matrix.

Every function takes and returns the tensors of `Checkpoint.finish`: ``W_enc_T [n, d_in]``, ``W_dec [n, d_out]`` and
vectors ``[n]``, by name; those that are absent are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_LATENT_SCALED = ("b_enc", "threshold", "b_gate", "b_mag")
"""Vectors that grow with the latents' unit."""


def fold_input_scale(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Let an SAE that was trained on ``scale * x`` read and write plain `x`; its latents stay what they were.

    ``W_enc *= scale``; ``W_dec /= scale``; ``b_dec /= scale``.
    """
    tensors["W_enc_T"].mul_(scale)
    tensors["W_dec"].div_(scale)
    tensors["b_dec"].div_(scale)
    return tensors


def fold_decoder_norms(tensors: dict[str, Tensor], norms: Tensor | None = None) -> dict[str, Tensor]:
    """Give decoder rows unit norm and measure latents in units of the old ones; the output stays what it was.

    ``W_dec[i] /= n_i``; ``W_enc[:, i] *= n_i``; biases and thresholds ``*= n_i``. `r_mag`, a ratio, stays. Right only
    for activations that a positive factor passes through: not for a TopK that ranks unscaled values.

    Args:
        tensors: the tensors.
        norms: norm of every decoder row ``[n]``, where it is known.
    """
    if norms is None:
        norms = decoder_norms(tensors["W_dec"])
    tensors["W_dec"].div_(norms[:, None])
    tensors["W_enc_T"].mul_(norms[:, None])
    for name in PER_LATENT_SCALED:
        if name in tensors:
            tensors[name] = tensors[name] * norms
    return tensors


def decoder_norms(W_dec: Tensor) -> Tensor:
    """Return the norm of every decoder row in float32, ``[n]``, without a float32 copy of the matrix."""
    return torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float32)
