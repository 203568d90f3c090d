"""How much is read besides what is learned, where a run does not say: shares of the run, within bounds.

A short run reads a tenth of its activations before the first step, to shuffle them, and another tenth to measure the
scale and the latents. In long runs, as in the paper's, all of it is a small part.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """A share of the activations that one process learns, within bounds.

    Attributes:
        share: of them.
        least: at least so many.
        most: at most so many.
    """

    share: float
    least: int
    most: int

    def of(self, activations: int) -> int:
        """Return the number for a run that learns from so many activations."""
        return min(max(round(self.share * activations), self.least), self.most)


BUFFER = Proportion(0.1, 0, 1_000_000)
"""Activations held for shuffling. The paper holds a million."""
STATISTICS = Proportion(0.02, 2048, 65_536)
"""Sample for the scale, the centre and the limit of norms."""
RECORDED = Proportion(0.08, 4096, 131_072)
"""Sample in which the strength of every latent is recorded."""
HELD_OUT = Proportion(0.005, 1024, 16_384)
"""Tokens that are measured and not learned; each measurement takes four forwards of them."""
FORWARD = Proportion(0.05, 1, 32_768)
"""Tokens per forward of the model."""


def buffer_size(activations: int, batch_size: int) -> int:
    """Return how many activations to hold for shuffling: a tenth of a run, at least two batches.

    Args:
        activations: that one process learns from.
        batch_size: activations per batch.
    """
    return max(BUFFER.of(activations), 2 * batch_size)


def sequences_per_batch(activations: int, context_length: int) -> int:
    """Return how many sequences to read in one forward of the model: a power of two, at most 32.

    What a forward gives is learned, or measured, as a whole, so that in a short run it is to be small.

    Args:
        activations: that one process learns from.
        context_length: tokens per sequence.
    """
    wanted = FORWARD.of(activations) // context_length
    return min(32, 1 << max(wanted.bit_length() - 1, 0))
