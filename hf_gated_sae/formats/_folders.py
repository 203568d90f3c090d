"""Folders of a listing by the files that they hold, and one file read twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from ..hub.location import Location
from ..storage import StoredTensor


def folders_with(location: Location, *names: str) -> list[str]:
    """Return the folders at or below `location` that hold files of all these names, relative to it, sorted."""
    paths = [PurePosixPath(file) for file in location.files]
    holding = [{path.parent for path in paths if path.name == name} for name in names]
    return sorted("" if str(folder) == "." else str(folder) for folder in set.intersection(*holding))


def again(tensor: StoredTensor, location: Location, file: str) -> StoredTensor:
    """Return a tensor of a file once more, mapped by itself: writing to one does not change the other.

    So a matrix that a checkpoint uses twice becomes two of ours, without a copy being made.
    """
    return replace(tensor, source=location.source(file))
