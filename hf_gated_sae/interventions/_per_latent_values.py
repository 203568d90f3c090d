"""Base class of edits with one number for each of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._checks import PerRow, latent_values_per_row
from .base import LatentEdit
from .model_call import SiteCall


@dataclass(frozen=True, eq=False)
class LatentValueEdit(LatentEdit, is_verb=False):
    """An edit of latents by one number for each, in a field of the verb.

    Attributes:
        numbers_field: name of that field.
    """

    numbers_field: ClassVar[str] = "values"

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, self.numbers_field, latent_values_per_row(self, self.numbers))
        super().__post_init__()

    @property
    def numbers(self) -> Mapping[int, PerRow]:
        """The number of each latent, or its numbers for the rows of the batch."""
        found: Mapping[int, PerRow] = getattr(self, self.numbers_field)
        return found

    @property
    def indices(self) -> list[int]:
        """The latents to change."""
        return list(self.numbers)

    def numbers_like(self, latents: Tensor, run: SiteCall) -> Tensor:
        """Return the numbers in the dtype and on the device of latents, in the order of `indices`.

        Args:
            latents: ``[B, S, n]``.
            run: the call, whose batch determines the rows.

        Returns:
            ``[n]``; ``[B, 1, n]`` if some differ between rows.

        Raises:
            InputError: if they are for another number of rows than the batch has.
        """
        values = list(self.numbers.values())
        rows = next((len(value) for value in values if isinstance(value, tuple)), None)
        if rows is None:
            return latents.new_tensor(values)
        by_row = zip(*(value if isinstance(value, tuple) else (value,) * rows for value in values), strict=True)
        what = f"{self.numbers_field} of {type(self).__name__}"
        return run.tokens.of_rows(latents.new_tensor([*by_row]), what).unsqueeze(1).to(latents.device)
