"""The latents that a training step works on, and sums over them.

An objective of sparse latents depends on few projections: those above a cut, below which value and gradient of every
term are zero. `functional.cpu` has a support that holds only these; `DenseSupport` holds all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .sparse_latents import SparseLatents


class Support(ABC):
    """The projections that an objective is computed from, and the operations on values of the same shape.

    Attributes:
        projection: ``(x - shift) @ W_enc``, ``[..., d_sae]``, or ``[live]`` if only a few of them are held.
        latents: the latent of each value ``[live]`` int64; None where there is one value for every latent.
    """

    projection: Tensor
    latents: Tensor | None

    @abstractmethod
    def project(self, W_enc_T: Tensor) -> Tensor:
        """Return the projections through another encoder ``[d_sae, d_in]``, in the shape of `projection`."""

    @abstractmethod
    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return ``values @ W_dec``, ``[..., d_out]``."""

    def decode_each(self, values: Sequence[Tensor], W_dec: Tensor, frozen: Sequence[bool]) -> Sequence[Tensor]:
        """Decode several values, which may be faster than one after the other.

        Args:
            values: each in the shape of `projection`.
            W_dec: ``[d_sae, d_out]``.
            frozen: for each, whether the decoder gets no gradient from it.

        Returns:
            ``values @ W_dec`` of each, ``[..., d_out]``.
        """
        pairs = zip(values, frozen, strict=True)
        return [self.decode(each, W_dec.detach() if still else W_dec) for each, still in pairs]

    @abstractmethod
    def mean_sum(self, values: Tensor) -> Tensor:
        """Return the mean over tokens of the sum over latents, ``[]``."""

    @abstractmethod
    def code(self, values: Tensor) -> Tensor | SparseLatents:
        """Return values as the latents of an SAE, without a gradient."""
