"""What an SAE reads and writes where; code that hooks SAEs into a model need not know how many sites there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .dtypes import Widest

if TYPE_CHECKING:
    from .model import SAEModel


class Wiring(Widest):
    """An SAE by its sources (sites that it reads) and outputs (sites that it writes), both counted from 0.

    The latents of a source are computed from that site's activation alone, and write to outputs of its number and
    above: all that an output needs has been seen when the model gets there. Here there is one source and one output;
    an architecture with several overrides these methods.
    """

    def sources_of(self, rows: Tensor) -> list[int]:
        """Return which source each latent reads, given the latents' rows ``[n]``."""
        return [0] * len(rows)

    def rows_in_source(self, rows: Tensor, source: int) -> Tensor:
        """Return the places of rows ``[n]``, all of one source, among the latents of that source."""
        return rows

    def encode_source(self: SAEModel | Any, x: Tensor, source: int, rows: Tensor | None = None) -> Tensor:
        """Turn one source's activation into its latents.

        Args:
            x: ``[..., d_in]``.
            source: which source it is.
            rows: rows ``[n]`` of the latents to compute, all of this source; None for all that it has.

        Returns:
            Latents ``[..., n]``.
        """
        self.require_encodable()
        latents: Tensor = self._encode(self._normalized(x), rows)
        return latents

    def rows_at(self: SAEModel | Any, rows: Tensor, output: int) -> Tensor:
        """Return what a unit of each latent writes at an output, ``[n, d_out]``; zeros where it does not write."""
        written: Tensor = self.W_dec[rows]
        return written

    def decode_at(self: SAEModel | Any, latents: Sequence[Tensor], output: int, x: Tensor) -> Tensor:
        """Return what is written at one output.

        Args:
            latents: of the sources up to this output, each ``[..., n]``.
            output: which output.
            x: the activation ``[..., d_in]`` of the source that belongs to this output; used where tokens are
                normalised or where there is a skip connection.

        Returns:
            ``[..., d_out]``, in the units of the output's activation.
        """
        written: Tensor = self.decode(latents[0], x)
        return written
