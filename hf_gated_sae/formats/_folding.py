"""Fold a layout's scales and norms into the weights, row by row and in place, without a copy of a matrix.

Every function takes and returns the tensors of `Checkpoint.finish`: ``W_enc_T [n, d_in]``, ``W_dec [n, d_out]`` and
vectors ``[n]``, by name; those that are absent are skipped. Matrices keep their dtype and are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

INPUT_SCALED = ("W_enc_T", "W_glu_T")
"""Matrices that read the input."""
PER_LATENT_SCALED = ("b_enc", "threshold", "b_gate", "b_mag")
"""Vectors that scale with the latents."""
BLOCK = 1 << 19
"""Number of values that are converted to a wider dtype at a time; an eighth of a matrix at most."""


def fold(
    tensors: dict[str, Tensor],
    *,
    scale_in: float = 1.0,
    scale_out: float | None = None,
    latent_unit: Tensor | None = None,
) -> dict[str, Tensor]:
    """Change the scales of input, output and latents together.

    For an SAE that was trained on ``scale_in * x`` and writes ``scale_out * y``, return the one that reads `x`, writes
    `y`, and whose latents are ``latent_unit`` times as large. With latent units ``u_i``:

    ``W_enc[:, i] *= scale_in * u_i``; biases and thresholds ``*= u_i``; ``W_dec[i] /= scale_out * u_i``;
    ``b_dec /= scale_out``; ``W_skip *= scale_in / scale_out``. `r_mag`, a ratio, stays, and so does the gate of a GLU.

    Valid for positively homogeneous activation functions; with a `latent_unit` not for a TopK that ranks unscaled
    values.

    Args:
        tensors: the tensors.
        scale_in: factor of the input in training.
        scale_out: factor of the output in training; `scale_in` by default.
        latent_unit: positive factor of every latent ``[n]``; 1 by default. A latent whose factor is 0, because its
            decoder row is zero, is always 0 afterwards.
    """
    scale_out = scale_in if scale_out is None else scale_out
    for name in INPUT_SCALED:
        if name in tensors:
            scale_rows(tensors[name], scale_in, latent_unit if name == "W_enc_T" else None)
    inverse = None if latent_unit is None else latent_unit.where(latent_unit > 0, torch.inf).reciprocal()
    scale_rows(tensors["W_dec"], 1 / scale_out, inverse)
    tensors["b_dec"] = _scaled(tensors["b_dec"], 1 / scale_out)
    if "W_skip" in tensors:
        scale_rows(tensors["W_skip"], scale_in / scale_out, None)
    if latent_unit is not None:
        for name in PER_LATENT_SCALED:
            if name in tensors:
                tensors[name] = _scaled(tensors[name], latent_unit)
    return tensors


def fold_input_scale(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Make an SAE that was trained on ``scale * x`` read and write plain `x`; its latents stay the same."""
    return fold(tensors, scale_in=scale)


def fold_decoder_norms(tensors: dict[str, Tensor], norms: Tensor | None = None) -> dict[str, Tensor]:
    """Scale decoder rows to unit norm, and latents by the old norms; the output stays the same.

    Args:
        tensors: the tensors.
        norms: norm of every decoder row ``[n]``; computed by default.
    """
    return fold(tensors, latent_unit=decoder_norms(tensors["W_dec"]) if norms is None else norms)


def gate_by_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn thresholds of ``latent_i * |W_dec[i]|`` into thresholds of the latents: ``threshold_i /= |W_dec[i]|``.

    A latent whose decoder row is zero gets the highest finite threshold.
    """
    threshold = tensors["threshold"]
    highest = torch.finfo(threshold.dtype).max
    of_latents = (threshold / decoder_norms(tensors["W_dec"])).nan_to_num(highest, posinf=highest)
    tensors["threshold"] = of_latents.clamp(max=highest).to(threshold.dtype)
    return tensors


def decoder_norms(W_dec: Tensor) -> Tensor:
    """Return the norm of every decoder row ``[n]``, in float32 or wider, without a wider copy of the matrix."""
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    if wide == W_dec.dtype:
        return torch.linalg.vector_norm(W_dec, dim=1)
    norms = W_dec.new_empty(len(W_dec), dtype=wide)
    for indices, _, widened in _blocks(W_dec, wide):
        norms[indices] = torch.linalg.vector_norm(widened, dim=1)
    return norms


def scale_rows(matrix: Tensor, scale: float, factors: Tensor | None) -> None:
    """Multiply every row of ``matrix [n, width]`` by `scale` and by its factor in ``factors [n]``, in place.

    Arithmetic of two dtypes makes a wide copy of the whole matrix, even in place; this makes one of a few rows.
    """
    if factors is None:
        if scale != 1:
            matrix.mul_(scale)
        return
    factors = factors * scale
    if matrix.dtype == factors.dtype:
        matrix.mul_(factors[:, None])
        return
    for indices, rows, widened in _blocks(matrix, factors.dtype):
        rows.copy_(widened.mul_(factors[indices, None]))


def _blocks(matrix: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a few rows of a matrix at a time: their indices, a view of them, and a copy in a wider dtype."""
    rows, width = matrix.shape
    at_once = max(1, min(BLOCK // max(width, 1), rows // 8))
    buffer = torch.empty_like(matrix[:at_once], dtype=wide)  # reused: many buffers would fragment the heap
    for start in range(0, rows, at_once):
        indices = slice(start, start + at_once)
        view = matrix[indices]
        yield indices, view, buffer[: len(view)].copy_(view)


def _scaled(vector: Tensor, factor: float | Tensor) -> Tensor:
    """Return a vector times a factor, computed in float32 or wider, in the dtype of the vector."""
    return (vector.to(torch.promote_types(vector.dtype, torch.float32)) * factor).to(vector.dtype)
