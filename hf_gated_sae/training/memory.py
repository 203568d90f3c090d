"""Estimated memory use of training SAEs, and checks that a run fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil
import torch

from ..errors import TrainingError
from ..modeling import SAEModel

MOMENTS = 2
"""Moments per weight that Adam stores."""

DENSE_BUFFERS = 4
"""Arrays ``[batch, d_sae]`` in memory at once in a dense step: pre-latents, latents, and their gradients."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a run needs besides the language model and the shuffle buffer.

    Attributes:
        weights: the parameters.
        gradients: of all parameters.
        moments: of the optimiser.
        per_activation: of a dense step, for each activation of its batch.
    """

    weights: int
    gradients: int
    moments: int
    per_activation: int

    @classmethod
    def of(cls, saes: Iterable[SAEModel]) -> TrainingMemory:
        """Return the memory of SAEs that are trained together."""
        weights = per_activation = 0
        for sae in saes:
            weights += sum(parameter.numel() * parameter.element_size() for parameter in sae.parameters())
            widths = 3 * (sae.config.d_in + sae.d_out) + DENSE_BUFFERS * sae.config.d_sae
            per_activation += widths * sae.b_dec.element_size()
        return cls(weights, weights, MOMENTS * weights, per_activation)

    def total(self, batch: int) -> int:
        """Return the bytes of a run with `batch` activations per step."""
        return self.weights + self.gradients + self.moments + batch * self.per_activation

    def largest_batch(self, available: int) -> int:
        """Return the number of activations per step that fit into `available` bytes; 0 if the weights do not fit."""
        return max(0, (available - self.total(0)) // self.per_activation)

    def advice(self, batch: int, available: int | None) -> str:
        """Return, in sentences, the memory that a run needs and the settings that would fit.

        Args:
            batch: activations per step.
            available: bytes; None if that is not known.
        """
        text = (
            f"Weights, gradients and moments take {in_bytes(self.total(0))}, a step on {batch} activations up to "
            f"{in_bytes(batch * self.per_activation)} more."
        )
        if available is None:
            return f"{text} Reduce activation_batch_size or d_sae."
        largest = self.largest_batch(available)
        if largest >= batch > 1:  # by this estimate all of it fits, so something else uses the memory
            return (
                f"{text} activation_batch_size={_round(batch // 2)} would fit into {in_bytes(available)}, which also "
                "holds the language model and the shuffle buffer; or reduce buffer_size or sequences_per_batch."
            )
        if largest >= 1:
            return f"{text} activation_batch_size={_round(largest)} would fit into {in_bytes(available)}."
        share = available / self.total(0)
        return f"{text} About {100 * share:.2g}% of the latents would fit into {in_bytes(available)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory could not be allocated, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of a device available to this process, its own included; None if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return None


def require_room(memory: TrainingMemory, beside: Mapping[str, int], device: torch.device) -> None:
    """Raise, before a run allocates it, if memory cannot hold the data that it holds throughout.

    Args:
        memory: of the SAEs.
        beside: bytes of other data held throughout, by the setting that determines the number.
        device: where all of it is held.

    Raises:
        TrainingError: naming the largest part.
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
            f"The run needs {in_bytes(sum(parts.values()))}, and {in_bytes(available)} are free ({takes}). "
            f"Reduce {re.split('[,=]', largest)[0]}."
        )


def in_bytes(count: float) -> str:
    """Return a human-readable size.

    >>> in_bytes(1_234_567)
    '1.23 MB'
    """
    return f"{short(count)}B"


def short(number: float) -> str:
    """Return a number with three digits and an SI prefix.

    >>> short(12_345)
    '12.3 k'
    """
    letters = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while abs(number) >= 999.5 and power < len(letters) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {letters[power]}"


def _round(number: int) -> int:
    """Round down to a power of two, as is usual for batch sizes."""
    return 1 << (number.bit_length() - 1)
