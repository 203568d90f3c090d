"""Checks of command-line arguments that need no model."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from ..errors import InputError, reason


def require_at_least(option: str, value: float | None, least: float, *, above: bool = False) -> None:
    """Raise unless a number is finite and large enough.

    Args:
        option: name of the option.
        value: the number; None if the option was not given.
        least: the lower bound.
        above: exclude the lower bound itself.

    Raises:
        InputError: with the option and the number.
    """
    if value is None:
        return
    if not math.isfinite(value) or value < least or (above and value == least):
        wanted = f"a number above {least:g}" if above else f"{least:g} or more"
        raise InputError(f"{option} is {value:g}; expected {wanted}.")


def require_writable(option: str, folder: Path) -> None:
    """Raise unless a folder can be created or written to; no file is left in it.

    Args:
        option: name of the option.
        folder: need not exist.

    Raises:
        InputError: with the reason.
    """
    nearest = folder.absolute()
    while not nearest.exists() and not nearest.is_symlink() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{option} {folder} cannot be written: {nearest} is not a folder.")
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-gated-sae-", dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder} cannot be written: {nearest}: {reason(error)}.") from error


def modification_time(folder: Path | None) -> int | None:
    """Return when the SAE in a folder was written, in nanoseconds; None if there is none."""
    config = None if folder is None else folder / "config.json"
    return config.stat().st_mtime_ns if config is not None and config.is_file() else None
