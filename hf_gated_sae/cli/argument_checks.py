"""Checks of what commands are given that need no model: each says in one sentence what is wrong."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from ..errors import InputError, reason


def require_at_least(option: str, value: float | None, least: float, *, above: bool = False) -> None:
    """Raise unless a number is finite and large enough.

    Args:
        option: the option that it was given to.
        value: the number; None if the option was not given.
        least: the smallest number that is accepted.
        above: whether the smallest number itself is not.

    Raises:
        InputError: with the option and the number.
    """
    if value is None:
        return
    if not math.isfinite(value) or value < least or (above and value == least):
        wanted = f"a number above {least:g}" if above else f"{least:g} or more"
        raise InputError(f"{option} is {value:g}; expected {wanted}.")


def require_writable(option: str, folder: Path) -> None:
    """Raise unless a folder can be written into, or made; nothing is left behind.

    Args:
        option: the option that it was given to.
        folder: the folder, which need not exist.

    Raises:
        InputError: saying what is in the way.
    """
    there = folder.absolute()
    while not there.exists() and not there.is_symlink() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{option} {folder} cannot be written: {there} is no folder.")
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-gated-sae-", dir=there):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder} cannot be written: {there}: {reason(error)}.") from error


def stamp(folder: Path | None) -> int | None:
    """Return when the SAE in a folder was written, in nanoseconds; None if there is none."""
    config = None if folder is None else folder / "config.json"
    return config.stat().st_mtime_ns if config is not None and config.is_file() else None
