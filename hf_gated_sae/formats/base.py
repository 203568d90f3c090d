"""What every checkpoint layout has to be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ..hub.location import Location
from ..modeling.loading import Checkpoint
from ..registry import Registry

formats: Registry[CheckpointFormat] = Registry("format", "hf_gated_sae.formats")


class CheckpointFormat(ABC):
    """A layout of an SAE's files. The docstring of a subclass says who writes it and which files it has.

    Attributes:
        name: short name, such as ``"native"``; a subclass without one is not registered.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the format."""
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            formats.register(cls.name, cls())

    @abstractmethod
    def folders(self, files: Sequence[str]) -> list[str]:
        """Return the folders that hold an SAE of this layout as far as file names tell; ``""`` is the root.

        Args:
            files: paths of all files, relative to the root.
        """

    @abstractmethod
    def claims(self, location: Location) -> bool:
        """Whether the folder holds an SAE of this layout, judged by the listing and small files alone."""

    @abstractmethod
    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Fetch what is needed and describe the SAE; its tensors are not read.

        Args:
            location: a folder that this format claims.
            variant: which of several sets of weights, where a layout has such.
        """

    def near_miss(self, location: Location) -> str | None:
        """Return why a folder that looks like this layout is not claimed, as a sentence; None if it does not."""
        return None
