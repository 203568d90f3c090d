"""Which layouts claim a folder (or file)."""

from __future__ import annotations

from ..errors import CheckpointError, InputError, unknown_name
from ..hub.location import Location
from ..modeling.description import HOME_MADE
from .base import CheckpointFormat, formats


def claims_of(location: Location) -> tuple[list[str], list[CheckpointError]]:
    """Return the names of the layouts that claim a folder (or file), and why others could not look at it.

    What cannot be read is not claimed: an optimiser's pickle beside an SAE does not keep the SAE from being loaded.
    Layouts whose files may have any name are asked only if no other one claims the folder, so that files are not
    fetched that nobody needs.
    """
    unreadable: list[CheckpointError] = []
    for any_name in (False, True):
        asked = {name: layout for name, layout in formats.items() if layout.any_name is any_name}
        found = [name for name, layout in asked.items() if _claims(layout, location, unreadable)]
        if found:
            return found, unreadable
    return [], unreadable


def is_claimed(location: Location) -> bool:
    """Whether any layout claims a folder (or file)."""
    return bool(claims_of(location)[0])


def _claims(layout: CheckpointFormat, location: Location, unreadable: list[CheckpointError]) -> bool:
    """Whether a layout claims a folder; not if what it would have to look at cannot be read."""
    try:
        return layout.claims(location)
    except CheckpointError as error:
        unreadable.append(error)
        return False


def the_layout(name: str, location: Location) -> CheckpointFormat:
    """Return the layout that the user chose.

    Raises:
        CheckpointError: if it does not claim the folder, or what it would have to look at cannot be read.
        UnknownNameError: if there is none of that name.
    """
    if name == HOME_MADE:
        raise InputError(
            f"Given format={name!r}, whose tensors the user describes, without architecture=: pass that, too, such as "
            "architecture='standard'."
        )
    if name not in formats:
        raise unknown_name("format", name, [*formats, HOME_MADE])
    layout = formats[name]
    if not layout.claims(location):
        others, _ = claims_of(location)
        why = layout.near_miss(location)
        what = f" It is in the layout {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"{location} is not in the layout {name!r} that format= names: it holds {location.listing()}."
            f"{f' {why}' if why else ''}{what}"
        )
    return layout
