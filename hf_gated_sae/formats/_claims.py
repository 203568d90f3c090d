"""Find the layouts that claim a folder (or file)."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..errors import CheckpointError, InputError, unknown_name
from ..hub.location import Location
from ..modeling.description import HOME_MADE
from .base import CheckpointFormat, formats


def claims_of(location: Location) -> tuple[list[str], list[CheckpointError]]:
    """Return the names of the layouts that claim a folder (or file), and the errors of layouts that could not read it.

    Unreadable files are not claimed: an optimiser's pickle beside an SAE does not prevent loading the SAE. Layouts
    whose files may have any name are asked only if no other one claims the folder, so that no files are fetched in
    vain.
    """
    unreadable: list[CheckpointError] = []
    names = {PurePosixPath(name).name for name in _near_files(location)}
    for any_name in (False, True):
        candidates = {name: layout for name, layout in formats.items() if layout.any_name is any_name}
        likely = {name: layout for name, layout in candidates.items() if not names or _has_file(layout, names)}
        found = [name for name, layout in likely.items() if _claims(layout, location, unreadable)]
        if found:
            return found, unreadable
    return [], unreadable


def is_claimed(location: Location) -> bool:
    """Whether any layout claims a folder (or file)."""
    return bool(claims_of(location)[0])


def _near_files(location: Location) -> list[str]:
    """Return the file at a location, or the files in a folder and in its direct subfolders."""
    if location.file is not None:
        return [location.file]
    return [name for name in location.files if name.count("/") <= 1]


def _has_file(layout: CheckpointFormat, names: Collection[str]) -> bool:
    """Whether one of the file names matches a pattern of the layout."""
    return any(fnmatchcase(name, pattern) for pattern in layout.files for name in names)


def _claims(layout: CheckpointFormat, location: Location, unreadable: list[CheckpointError]) -> bool:
    """Whether a layout claims a folder; False, with the error recorded, if a file that it needs cannot be read."""
    try:
        return layout.claims(location)
    except CheckpointError as error:
        unreadable.append(error)
        return False


def requested_layout(name: str, location: Location) -> CheckpointFormat:
    """Return the layout that the user named.

    Raises:
        CheckpointError: if it does not claim the folder, or a file that it needs cannot be read.
        UnknownNameError: if there is no layout of that name.
    """
    if name == HOME_MADE:
        raise InputError(
            f"Given format={name!r} without architecture=, which describes a home-made checkpoint: pass that, too, "
            "such as architecture='standard'."
        )
    if name not in formats:
        raise unknown_name("format", name, [*formats, HOME_MADE])
    layout = formats[name]
    if not layout.claims(location):
        others, _ = claims_of(location)
        why = layout.near_miss(location)
        actual = f" It is in the layout {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"{location} is not in the layout {name!r} that format= names: it has {location.listing()}."
            f"{f' {why}' if why else ''}{actual}"
        )
    return layout
