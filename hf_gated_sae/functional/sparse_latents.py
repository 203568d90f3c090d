"""Sparse latents: the active latents of ``[tokens, d_sae]`` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError, shown
from .indices import true_indices
from .short_repr import short_repr


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The non-zero latents of some tokens, token by token.

    Those of token ``t``, counted through all leading axes, are ``offsets[t] : offsets[t + 1]`` of `indices` and
    `values`. NaN counts as non-zero.

    Attributes:
        offsets: ``[tokens + 1]`` int64, beginning with 0.
        indices: index of each active latent ``[live]`` int64.
        values: its value ``[live]``.
        shape: of the dense latents, ``(..., d_sae)``.
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    __repr__ = short_repr

    @classmethod
    def of(cls, tokens: Tensor, indices: Tensor, values: Tensor, shape: Sequence[int]) -> SparseLatents:
        """Sort values by token.

        Args:
            tokens: the token of each value ``[live]``, in any order.
            indices: the latent of each value ``[live]``.
            values: ``[live]``; those of one token keep their order.
            shape: of the dense latents, ``(..., d_sae)``.
        """
        count = math.prod(shape[:-1])
        offsets = tokens.new_zeros(count + 1)
        torch.cumsum(torch.bincount(tokens, minlength=count), 0, out=offsets[1:])
        order = tokens.to(torch.int32).argsort(stable=True)  # half the time of int64
        return cls(offsets, indices[order], values[order], tuple(shape))

    @classmethod
    def from_dense(cls, latents: Tensor) -> SparseLatents:
        """Return the non-zero latents of a dense tensor.

        Args:
            latents: ``[..., d_sae]``.
        """
        d_sae = latents.shape[-1]
        places = true_indices(latents != 0)
        tokens = places // max(d_sae, 1)
        return cls.of(tokens, places - tokens * d_sae, latents.reshape(-1)[places], latents.shape)

    @classmethod
    def from_indices(cls, indices: Tensor, values: Tensor, d_sae: int) -> SparseLatents:
        """Return the non-zero latents, given `k` latents for every token.

        Args:
            indices: latents ``[..., k]``, none of them twice for one token.
            values: ``[..., k]``.
            d_sae: number of latents.
        """
        places = true_indices(values != 0)
        tokens, shape = places // max(values.shape[-1], 1), (*values.shape[:-1], d_sae)
        return cls.of(tokens, indices.reshape(-1)[places], values.reshape(-1)[places], shape)

    @classmethod
    def cat(cls, parts: Sequence[SparseLatents], shape: Sequence[int]) -> SparseLatents:
        """Concatenate the tokens of one or more parts; `shape` gives the leading axes of the result."""
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + part.indices.shape[0])
        offsets = [part.offsets[1:] + first for part, first in zip(parts, ends, strict=False)]
        return cls(
            torch.cat([parts[0].offsets[:1], *offsets]),
            torch.cat([part.indices for part in parts]),
            torch.cat([part.values for part in parts]),
            tuple(shape),
        )

    @property
    def d_sae(self) -> int:
        """Number of latents of the SAE."""
        return self.shape[-1]

    @property
    def l0(self) -> Tensor:
        """Number of active latents per token, ``[...]`` int64."""
        return self.offsets.diff().reshape(self.shape[:-1])

    @property
    def tokens(self) -> Tensor:
        """The token of every active latent, counted through all leading axes, ``[live]`` int64."""
        count = self.offsets.shape[0] - 1
        numbers = torch.arange(count, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=self.indices.shape[0])

    def dense(self) -> Tensor:
        """Return the latents ``[..., d_sae]``, zeros included."""
        flat = self.values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.tokens * self.d_sae + self.indices,), self.values).reshape(self.shape)

    def select(self, latents: Sequence[int] | Tensor) -> Tensor:
        """Return some latents of every token, zeros included.

        Args:
            latents: integers ``[n]``, each in ``0 .. d_sae - 1``; one may occur more than once.

        Returns:
            ``[..., n]``.

        Raises:
            InputError: if they are not integers.
            ShapeError: if a latent is out of range.
        """
        wanted = latent_numbers(latents)
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.d_sae:
            raise ShapeError(f"Given latents {wanted.tolist()[:8]}, expected numbers from 0 to {self.d_sae - 1}.")
        wanted, n = wanted.to(self.indices.device), len(wanted)
        columns = wanted.new_full((self.d_sae,), n)
        columns[wanted] = torch.arange(n, device=wanted.device)
        found = columns[self.indices]
        [here] = torch.where(found < n)
        chosen = self.values.new_zeros(math.prod(self.shape[:-1]) * n)
        chosen = chosen.index_put((self.tokens[here] * n + found[here],), self.values[here])
        return chosen.reshape(*self.shape[:-1], n)[..., columns[wanted]]

    def rows(self, start: int, stop: int) -> SparseLatents:
        """Return the tokens ``start : stop``, counted through all leading axes, under one axis.

        Raises:
            ShapeError: unless ``0 <= start <= stop <= tokens``; a negative number is not counted from the end.
        """
        tokens = self.offsets.shape[0] - 1
        if not 0 <= start <= stop <= tokens:
            raise ShapeError(
                f"Given the tokens {start} : {stop}, expected a range from 0 to {tokens}, the number of tokens."
            )
        first, last = (int(end) for end in self.offsets[[start, stop]])
        offsets = self.offsets[start : stop + 1] - first
        return SparseLatents(offsets, self.indices[first:last], self.values[first:last], (stop - start, self.d_sae))

    def to(self, *args: Any, **kwargs: Any) -> SparseLatents:
        """Move to a device, or convert the values to a dtype; arguments as for `torch.Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        return SparseLatents(self.offsets.to(values.device), self.indices.to(values.device), values, self.shape)


def latent_numbers(latents: object) -> Tensor:
    """Return indices of latents as a tensor ``[n]`` int64, on the device that they are on.

    Raises:
        InputError: if they are not integers; a mask is refused, not read as zeros and ones.
    """
    try:
        found = torch.as_tensor(latents).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.ones(1)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole and (found.numel() or isinstance(latents, Tensor)):
        seen = f"as a tensor of {found.dtype}" if isinstance(latents, Tensor) else shown(latents)
        raise InputError(f"Given the latents {seen}, expected integers, such as [3, 7].")
    return found.to(torch.int64)
