"""What training an SAE takes in memory, on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from ..modeling import SAEModel

MOMENTS = 2
"""Numbers that Adam keeps for every weight."""

DENSE_BUFFERS = 4
"""Arrays ``[batch, d_sae]`` alive at once in a step on all latents: pre-latents, latents, and their gradients."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a run takes beside the language model and its buffer of activations.

    Attributes:
        weights: the parameters.
        gradients: of all parameters.
        moments: of the optimiser.
        per_activation: of a step, for each activation of its batch, where all latents are computed.
    """

    weights: int
    gradients: int
    moments: int
    per_activation: int

    @classmethod
    def of(cls, saes: Iterable[SAEModel]) -> TrainingMemory:
        """Return what SAEs that are trained together take."""
        weights = per_activation = 0
        for sae in saes:
            weights += sum(parameter.numel() * parameter.element_size() for parameter in sae.parameters())
            widths = 3 * (sae.config.d_in + sae.d_out) + DENSE_BUFFERS * sae.config.d_sae
            per_activation += widths * sae.b_dec.element_size()
        return cls(weights, weights, MOMENTS * weights, per_activation)

    def total(self, batch: int) -> int:
        """Return the bytes of a run with so many activations per step."""
        return self.weights + self.gradients + self.moments + batch * self.per_activation

    def largest_batch(self, available: int) -> int:
        """Return how many activations per step fit into so many bytes; 0 if not even the weights do."""
        return max(0, (available - self.total(0)) // self.per_activation)

    def advice(self, batch: int, available: int | None) -> str:
        """Return, in sentences, what a run takes and what would fit.

        Args:
            batch: activations per step.
            available: bytes; None if that is not known.
        """
        text = (
            f"Weights, gradients and moments take {_gigabytes(self.total(0))}, a step on {batch} activations up to "
            f"{_gigabytes(batch * self.per_activation)} more."
        )
        if available is None:
            return f"{text} Make activation_batch_size or d_sae smaller."
        fits = min(self.largest_batch(available), batch // 2)  # the whole did not fit, whatever the paper says
        if fits >= 1:
            return f"{text} Into {_gigabytes(available)} would fit activation_batch_size={_round(fits)}."
        share = available / self.total(0)
        return f"{text} Into {_gigabytes(available)} would fit about {share:.0%} of the latents."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of a device that a run could have if it were alone there; None if that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return None


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _round(number: int) -> int:
    """Round down to a power of two, as batches go."""
    return 1 << (number.bit_length() - 1)
