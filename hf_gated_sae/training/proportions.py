"""Default sizes of the shuffle buffer, samples and held-out text: shares of the run's activations, within bounds.

A short run reads a tenth of its activations before the first step, to shuffle them, and another tenth to measure the
scale and the latents. In long runs, such as the paper's, these are a small part.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """A share of the activations that one process trains on, within bounds.

    Attributes:
        share: of those activations.
        least: lower bound.
        most: upper bound.
    """

    share: float
    least: int
    most: int

    def of(self, activations: int) -> int:
        """Return the size for a run that trains on `activations` activations."""
        return min(max(round(self.share * activations), self.least), self.most)


BUFFER = Proportion(0.1, 0, 1_000_000)
"""Activations held for shuffling. The paper holds a million."""
STATISTICS = Proportion(0.02, 2048, 65_536)
"""Sample for the scale, the centre and the norm limit."""
RECORDED = Proportion(0.08, 4096, 131_072)
"""Sample on which the largest and mean activation of every latent are recorded."""
HELD_OUT = Proportion(0.005, 1024, 16_384)
"""Held-out tokens; each evaluation takes four forwards of them."""
FORWARD = Proportion(0.05, 1, 32_768)
"""Tokens per forward of the model."""


def buffer_size(activations: int, batch_size: int) -> int:
    """Return how many activations to hold for shuffling: a tenth of a run, at least two batches.

    Args:
        activations: number that one process trains on.
        batch_size: activations per batch.
    """
    return max(BUFFER.of(activations), 2 * batch_size)


def sequences_per_batch(activations: int, context_length: int) -> int:
    """Return how many sequences to read in one forward of the model: a power of two, at most 32.

    All activations of a forward are used, so it has to be small in a short run.

    Args:
        activations: number that one process trains on.
        context_length: tokens per sequence.
    """
    wanted = FORWARD.of(activations) // context_length
    return min(32, 1 << max(wanted.bit_length() - 1, 0))
