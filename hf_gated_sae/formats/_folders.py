"""Find folders by the files in them, and map a tensor a second time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from ..hub.location import Location
from ..storage import StoredTensor


def folders_with(location: Location, *names: str) -> list[str]:
    """Return the folders at or below `location` that have files of all these names, relative to it, sorted."""
    paths = [PurePosixPath(file) for file in location.files]
    containing = [{path.parent for path in paths if path.name == name} for name in names]
    return sorted("" if str(folder) == "." else str(folder) for folder in set.intersection(*containing))


def mapped_again(tensor: StoredTensor, location: Location, file: str) -> StoredTensor:
    """Return a tensor of a file with a memory map of its own, so that writing to one does not change the other.

    So a matrix that a checkpoint uses twice becomes two parameters without a copy.
    """
    return replace(tensor, source=location.source(file))
