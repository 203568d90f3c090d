"""Encoding into the latents that are on, and reconstructing, without ``[tokens, d_sae]`` ever in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import cpu
from ..functional.linear import linear
from ..functional.parallel import DataParallelGroup, LatentParallelGroup
from ..functional.sparse_decode import DENSEST
from ..functional.sparse_latents import SparseLatents
from ..functional.tensor_checks import is_plain, only_values
from .dtypes import Widest

if TYPE_CHECKING:
    from .model import SAEModel

ACTIVATIONS_AT_ONCE = 1 << 23
"""Numbers in the activations that are encoded together where only active latents are kept."""

LATENTS_AT_ONCE = {"cpu": 1 << 22}
"""Latents, zeros included, that exist at once where an architecture computes them all: 16 MB stay in a cache."""

LATENTS_AT_ONCE_ELSEWHERE = 1 << 28
"""The same on other devices, where only memory is the reason."""

FEWEST_TOKENS = 64
"""Tokens that are encoded together however many latents there are."""


class Sparse(Widest):
    """Encoding that keeps only what is on.

    An architecture with one encoder product, of which each latent is a function of its own projection, defines
    `_activate`; with `_cut` its active latents are found without computing the others.
    """

    latent_group: LatentParallelGroup | None = None
    """Where other processes hold the rest of the latents, of which this is then a part."""

    data_group: DataParallelGroup | None = None
    """Where other processes train the same SAE on the rest of a batch, for what is decided by a batch as a whole."""

    def _encode(self: SAEModel | Any, x: Tensor, latents: Tensor | None) -> Tensor:
        """Encode framed activations; `latents` selects rows, None means all. Here it is `_activate` of `_project`."""
        activated: Tensor = self._activate(self._project(x, latents), latents)
        return activated

    def _activate(self, projection: Tensor, latents: Tensor | None) -> Tensor:
        """Turn projections into latents, of all rows or of those given; `latents` may be as long as `projection`."""
        raise NotImplementedError(f"{type(self).__name__} must define _encode or _activate.")

    def _cut(self) -> Tensor | None:
        """Return ``[d_sae]`` so that `_activate` gives 0 for a projection at or below it; None if there is no such.

        However sums and products are rounded: too low a value costs time, too high a one costs latents.
        """
        return None

    def _kept(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return which latents may be on and their values, ``[..., k]`` each; None where no number of them is kept."""
        return None

    def _centred(self: SAEModel | Any, x: Tensor) -> Tensor:
        """Return what the encoder's matrix is applied to: ``x - b_dec``, or `x` without `apply_b_dec_to_input`."""
        shift = self._shift()
        return x if shift is None else x - shift

    def _shift(self: SAEModel | Any) -> Tensor | None:
        """Return what is subtracted from the input, ``[d_in]``; None without `apply_b_dec_to_input`."""
        if not self.config.apply_b_dec_to_input:
            return None
        return self.b_dec if self.latent_group is None else self.latent_group.alike(self.b_dec)

    def _project(self: SAEModel | Any, x: Tensor, latents: Tensor | None) -> Tensor:
        """Return ``(x - b_dec) @ W_enc`` (``x @ W_enc`` without `apply_b_dec_to_input`) for the selected latents."""
        return linear(self._centred(x), self._take(self.W_enc_T, latents))

    @staticmethod
    def _take(parameter: Tensor, latents: Tensor | None) -> Tensor:
        """Select rows of a per-latent parameter."""
        return parameter if latents is None else parameter.index_select(0, latents)  # half the overhead of [latents]

    def _few(self: SAEModel | Any, x: Tensor, most: float) -> SparseLatents | None:
        """Return the active latents of framed activations ``[tokens, d_in]`` without computing the others.

        None if the architecture has no way to, or if more than about this share of the latents are on.
        """
        cut = self._cut() if type(self)._encode is Sparse._encode else None
        if cut is None:
            return self._few_kept(x)
        found = cpu.find_above(self._centred(x), self.W_enc_T, cut, most=most)
        if found is None:
            return None
        tokens, latents, projections = found
        values = self._activate(projections, latents)
        on = values != 0
        if not on.all():
            tokens, latents, values = tokens[on], latents[on], values[on]
        return SparseLatents.of(tokens, latents, values, (len(x), len(self.W_enc_T)))

    def _few_kept(self: SAEModel | Any, x: Tensor) -> SparseLatents | None:
        """Return the active latents of an architecture that keeps so many per token; None if it does not."""
        parts = []
        for part in _latent_chunks(self, x):
            kept = self._kept(part)
            if kept is None:
                return None
            indices, values = kept
            parts.append(SparseLatents.from_indices(indices, values, self.config.d_sae))
        return SparseLatents.cat(parts, (len(x), self.config.d_sae))

    def encode_sparse(self: SAEModel | Any, x: Tensor) -> SparseLatents:
        """Turn activations into the latents that are on.

        Equal to ``encode(x)`` to rounding. Where no gradients are wanted, a few tokens are encoded at a time.

        Args:
            x: activations ``[..., d_in]``; computed in the wider of their dtype and the SAE's.

        Returns:
            Those latents of ``encode(x)`` that are not zero.

        Raises:
            ShapeError: if the last axis of `x` is not `d_in` wide.
            LatentIndexError: if only some latents were loaded, and whether they are on depends on the others.
        """
        self.require_encodable()
        if not _in_parts(self, x):
            return SparseLatents.from_dense(self.encode(x))
        parts: list[SparseLatents] = []
        for chunk in _chunks(x.reshape(-1, *self.input_shape), ACTIVATIONS_AT_ONCE):
            few = self._few(self._normalized(chunk), 1.0) if is_plain(x) else None
            if few is not None:
                parts.append(few)
            else:
                parts += [SparseLatents.from_dense(self.encode(part)) for part in _latent_chunks(self, chunk)]
        return SparseLatents.cat(parts, (*_leading(self, x), parts[0].d_sae))

    def reconstruct(self: SAEModel | Any, x: Tensor) -> Tensor:
        """Encode and decode, keeping no latents.

        Equal to ``sae(x).reconstruction`` to rounding. Where gradients, `torch.func` or a compiler need it, and away
        from a CPU, it is that very call; else latents exist for a few tokens at a time, and only those that are on.

        Args:
            x: activations ``[..., d_in]``; computed in the wider of their dtype and the SAE's.

        Returns:
            Reconstruction ``[..., d_out]``.

        Raises:
            ShapeError: if the last axis of `x` is not `d_in` wide.
            LatentIndexError: if only some latents were loaded.
        """
        if not _in_parts(self, x) or not is_plain(x):
            output: Any = self.forward(x)
            whole: Tensor = output.reconstruction
            return whole
        flat, first = x.reshape(-1, *self.input_shape), 0
        written = x.new_empty(0)
        for chunk in _chunks(flat, ACTIVATIONS_AT_ONCE):
            few = self._few(self._normalized(chunk), DENSEST)
            for part in [chunk] if few is not None else _latent_chunks(self, chunk):
                decoded = self.decode(self.encode(part) if few is None else few, part)
                if not first:
                    written = decoded.new_empty(len(flat), *decoded.shape[1:])
                written[first : first + len(part)] = decoded
                first += len(part)
        return written.reshape(*_leading(self, x), *written.shape[1:])


def _leading(sae: SAEModel, x: Tensor) -> tuple[int, ...]:
    """Return the axes of activations that count tokens."""
    return tuple(x.shape[: x.ndim - len(sae.input_shape)])


def _in_parts(sae: SAEModel, x: Tensor) -> bool:
    """Whether activations may be encoded part by part: tokens alone, and nothing wanted but values."""
    if not sae.per_token or x.shape[-len(sae.input_shape) :] != sae.input_shape or not x.numel():
        return False  # `encode` says what is wrong, if anything
    if x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
        return False
    if sae.latent_group is not None:
        return False  # how the parts are cut depends on the latents, and all processes have to cut alike
    return only_values(x, *sae.parameters(), *sae.buffers())


def _latent_chunks(sae: SAEModel, x: Tensor) -> Iterator[Tensor]:
    """Split activations so that all latents of a part fit a cache, or the memory of another device."""
    return _chunks(x, LATENTS_AT_ONCE.get(x.device.type, LATENTS_AT_ONCE_ELSEWHERE), sae.config.rows)


def _chunks(x: Tensor, numbers: int, each: int = 0) -> Iterator[Tensor]:
    """Split tokens evenly, so that a part holds about so many numbers, of which a token has its own, or `each`."""
    most = max(FEWEST_TOKENS, numbers // (each or math.prod(x.shape[1:])))
    size = math.ceil(len(x) / math.ceil(len(x) / most))
    yield from x.split(size)
