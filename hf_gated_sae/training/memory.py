"""What training an SAE takes in memory, on paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil
import torch

from ..errors import TrainingError
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
            f"Weights, gradients and moments take {in_bytes(self.total(0))}, a step on {batch} activations up to "
            f"{in_bytes(batch * self.per_activation)} more."
        )
        if available is None:
            return f"{text} Make activation_batch_size or d_sae smaller."
        largest = self.largest_batch(available)
        if largest >= batch > 1:  # on paper all of it fits, so that something else has taken the room
            return (
                f"{text} Into {in_bytes(available)}, of which the language model and the buffer of its activations "
                f"take their part, would fit activation_batch_size={_round(batch // 2)}; or make buffer_size or "
                "sequences_per_batch smaller."
            )
        if largest >= 1:
            return f"{text} Into {in_bytes(available)} would fit activation_batch_size={_round(largest)}."
        share = available / self.total(0)
        return f"{text} Into {in_bytes(available)} would fit about {100 * share:.2g}% of the latents."


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


def require_room(memory: TrainingMemory, beside: Mapping[str, int], device: torch.device) -> None:
    """Raise if memory cannot hold what a run holds throughout, before it has begun to fill up.

    Args:
        memory: what the SAEs take.
        beside: bytes of what is held beside them, by what decides how many.
        device: where all of it is.

    Raises:
        TrainingError: naming what takes most.
    """
    available = available_memory(device)
    if available is None:
        return
    if device.type == "cpu":
        available += psutil.swap_memory().free
    parts = {"d_sae, with weights, gradients and moments": memory.total(0), **beside}
    if sum(parts.values()) > available:
        largest = max(parts, key=lambda name: parts[name])
        takes = ", ".join(f"{name}: {in_bytes(count)}" for name, count in parts.items())
        raise TrainingError(
            f"The run would hold {in_bytes(sum(parts.values()))}, and {in_bytes(available)} are free ({takes}). "
            f"Make {re.split('[,=]', largest)[0]} smaller."
        )


def in_bytes(count: float) -> str:
    """Return a size for people.

    >>> in_bytes(1_234_567)
    '1.23 MB'
    """
    return f"{short(count)}B"


def short(number: float) -> str:
    """Return three digits of a number and the letter for its thousands.

    >>> short(12_345)
    '12.3 k'
    """
    letters = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while abs(number) >= 999.5 and power < len(letters) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {letters[power]}"


def _round(number: int) -> int:
    """Round down to a power of two, as batches go."""
    return 1 << (number.bit_length() - 1)
