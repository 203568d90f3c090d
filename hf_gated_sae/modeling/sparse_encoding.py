"""Encoding into active latents, and reconstructing, without ``[tokens, d_sae]`` in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional import cpu
from ..functional.sparse_decode import DENSEST
from ..functional.sparse_latents import SparseLatents
from ..functional.tensor_checks import is_plain, only_values

if TYPE_CHECKING:
    from .model import SAEModel

ACTIVATIONS_AT_ONCE = 1 << 23
"""Numbers in the activations that are encoded together where only active latents are kept."""

LATENTS_AT_ONCE = {"cpu": 1 << 22}
"""Latents, zeros included, that exist at once where an architecture computes them all: 16 MB stay in a cache."""

LATENTS_AT_ONCE_ELSEWHERE = 1 << 28
"""The same on other devices, where only memory limits it."""

FEWEST_TOKENS = 64
"""Minimum number of tokens that are encoded together, however many latents there are."""


def encode_sparse(sae: SAEModel, x: Tensor) -> SparseLatents:
    """Return the active latents of activations ``[..., d_in]``; see `SAEModel.encode_sparse`."""
    if not _in_parts(sae, x):
        return SparseLatents.from_dense(sae.encode(x))
    parts: list[SparseLatents] = []
    for chunk in _chunks(x.reshape(-1, *sae.input_shape), ACTIVATIONS_AT_ONCE):
        few = _few(sae, sae._normalized(chunk), 1.0) if is_plain(x) else None
        if few is not None:
            parts.append(few)
        else:
            parts += [SparseLatents.from_dense(sae.encode(part)) for part in latent_chunks(sae, chunk)]
    return SparseLatents.cat(parts, (*_leading(sae, x), parts[0].d_sae))


def reconstruct(sae: SAEModel, x: Tensor) -> Tensor:
    """Return the reconstruction of activations ``[..., d_in]``; see `SAEModel.reconstruct`."""
    if not _in_parts(sae, x) or not is_plain(x):
        whole = sae.forward(x).reconstruction
        assert whole is not None
        return whole
    flat, first = x.reshape(-1, *sae.input_shape), 0
    written = x.new_empty(0)
    for chunk in _chunks(flat, ACTIVATIONS_AT_ONCE):
        few = _few(sae, sae._normalized(chunk), DENSEST)
        for part in [chunk] if few is not None else latent_chunks(sae, chunk):
            decoded = sae.decode(sae.encode(part) if few is None else few, part)
            if not first:
                written = decoded.new_empty(len(flat), *decoded.shape[1:])
            written[first : first + len(part)] = decoded
            first += len(part)
    return written.reshape(*_leading(sae, x), *written.shape[1:])


def _few(sae: SAEModel, x: Tensor, most: float) -> SparseLatents | None:
    """Return the active latents of normalised activations ``[tokens, d_in]`` without computing the others.

    None if the architecture cannot do that, or if more than about the share `most` of the latents is active.
    """
    cut = sae._cut() if sae.encodes_projections else None
    if cut is None:
        return sae._select_sparse(x)
    found = cpu.find_above(sae._centred(x), sae.W_enc_T, cut, most=most)
    if found is None:
        return None
    tokens, latents, projections = found
    values = sae._activate(projections, latents)
    on = values != 0
    if not on.all():
        tokens, latents, values = tokens[on], latents[on], values[on]
    return SparseLatents.of(tokens, latents, values, (len(x), len(sae.W_enc_T)))


def select_sparse(sae: SAEModel, x: Tensor) -> SparseLatents | None:
    """Return the selected latents of normalised activations, a few tokens at a time; None without a selection."""
    parts = []
    for part in latent_chunks(sae, x):
        selected = sae._select(part)
        if selected is None:
            return None
        indices, values = selected
        parts.append(SparseLatents.from_indices(indices, values, sae.config.d_sae))
    return SparseLatents.cat(parts, (len(x), sae.config.d_sae))


def _leading(sae: SAEModel, x: Tensor) -> tuple[int, ...]:
    """Return the sizes of the axes of activations that count tokens."""
    return tuple(x.shape[: x.ndim - len(sae.input_shape)])


def _in_parts(sae: SAEModel, x: Tensor) -> bool:
    """Whether activations may be encoded part by part: tokens are independent, and only values are needed."""
    if not sae.per_token or x.shape[-len(sae.input_shape) :] != sae.input_shape or not x.numel():
        return False  # if anything is wrong, `encode` raises
    if x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
        return False
    if sae.latent_group is not None:
        return False  # how the parts are cut depends on the latents, and all processes have to split in the same way
    return only_values(x, *sae.parameters(), *sae.buffers())


def latent_chunks(sae: SAEModel, x: Tensor) -> Iterator[Tensor]:
    """Split activations so that all latents of a part fit a cache, or the memory of another device."""
    return _chunks(x, LATENTS_AT_ONCE.get(x.device.type, LATENTS_AT_ONCE_ELSEWHERE), sae.config.rows)


def _chunks(x: Tensor, numbers: int, each: int = 0) -> Iterator[Tensor]:
    """Split tokens evenly into parts of about `numbers` values; a token has `each`, or by default its own number."""
    most = max(FEWEST_TOKENS, numbers // (each or math.prod(x.shape[1:])))
    size = math.ceil(len(x) / math.ceil(len(x) / most))
    yield from x.split(size)
