"""What edits have in common that are given one number for each of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .arguments import latent_values
from .base import LatentEdit


@dataclass(frozen=True, eq=False)
class ValuedEdit(LatentEdit, is_verb=False):
    """Changes latents by a number for each, which a field of the verb holds.

    Attributes:
        numbers_field: name of that field.
    """

    numbers_field: ClassVar[str] = "values"

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, self.numbers_field, latent_values(self, self.numbers))
        super().__post_init__()

    @property
    def numbers(self) -> Mapping[int, float]:
        """The number of each latent."""
        found: Mapping[int, float] = getattr(self, self.numbers_field)
        return found

    @property
    def indices(self) -> list[int]:
        """The latents to change."""
        return list(self.numbers)

    def numbers_like(self, latents: Tensor) -> Tensor:
        """Return the numbers ``[n]`` in the dtype and on the device of latents, in the order of `indices`."""
        return latents.new_tensor(list(self.numbers.values()))
