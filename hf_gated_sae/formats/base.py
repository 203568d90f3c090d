"""The interface of a checkpoint layout."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ..registry import Registry
from ..storage import StoredTensor

formats: Registry[CheckpointFormat] = Registry("format", "hf_gated_sae.formats")


@dataclass(frozen=True)
class Example:
    """A small checkpoint in a layout, for tests.

    Attributes:
        repo: repository id; the files are in the folder of that name.
        address: folder or file of the SAE inside it.
    """

    repo: str
    address: str = ""


class CheckpointFormat(ABC):
    """A layout of an SAE's files. The docstring of a subclass names its writer and its files.

    Attributes:
        name: short name, such as ``"native"``; a subclass without one is not registered.
        files: name patterns of its tensor files, perhaps with ``*``. A layout is asked only about folders with such a
            file, and about addresses without files.
        any_name: whether its files may have any name, so that it reads files that may be something else. It is asked
            only about folders and files that no other layout claims.
    """

    name: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ("*",)
    any_name: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the format."""
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("name"):
            formats.register(cls.name, cls())

    @abstractmethod
    def addresses(self, location: Location) -> list[str]:
        """Return the addresses of SAEs of this layout below a folder, from file names (and small files).

        Returns:
            Folders, or files of folders with several SAEs, relative to `location`; ``""`` is the folder itself.
        """

    @abstractmethod
    def claims(self, location: Location) -> bool:
        """Whether the folder (or file) is one SAE of this layout, judged by the listing, small files and headers."""

    @abstractmethod
    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Describe the SAE from its headers; weights are not read.

        Args:
            location: a folder or file that this format claims.
            variant: which of several sets of weights, if the layout has several.
        """

    @abstractmethod
    def examples(self, root: Path) -> list[Example]:
        """Write small checkpoints of this layout, one of every kind, below ``root/<repo>``.

        They have the file names, tensor names, axes and dtypes of real ones, random values, and small widths.
        """

    def near_miss(self, location: Location) -> str | None:
        """Return why a folder that resembles this layout is not claimed, as a sentence; None if it does not."""
        return None


def selected_file(location: Location, pattern: re.Pattern[str]) -> str | None:
    """Return the file of an SAE, in a layout with one SAE per file.

    Args:
        location: a file, or a folder.
        pattern: pattern that the file's name must match in full.

    Returns:
        The file at `location`, or the only matching one directly in the folder; None if there is not exactly one.
    """
    if location.file is not None:
        return location.file if pattern.fullmatch(location.file) else None
    found = [name for name in location.files if pattern.fullmatch(name)]
    return found[0] if len(found) == 1 else None


def widths(stored: Mapping[str, StoredTensor]) -> tuple[int, int, int]:
    """Return ``d_sae``, ``d_in`` and ``d_out`` from the shapes of `W_enc_T` and `W_dec`.

    Raises:
        CheckpointError: if one is missing or not a matrix, or they differ in ``d_sae``.
    """
    shapes = [stored[name].shape if name in stored else () for name in ("W_enc_T", "W_dec")]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        held = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in stored.items())
        raise CheckpointError(
            f"Encoder and decoder have shapes {list(shapes[0])} and {list(shapes[1])}; expected the same number of "
            f"rows, one per latent. The file holds {held}: fetch it again."
        )
    return shapes[0][0], shapes[0][1], shapes[1][1]
