"""Every error that this package raises: one root, and each is also the builtin that a caller would expect.

A message says what was given, what was expected and what to do; names get close matches.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST_MESSAGE = 2000


class SAEError(Exception):
    """Root of the package's errors."""

    def __str__(self) -> str:
        """Return the message; of one that repeats what a file or a caller has made very long, start and end."""
        message = Exception.__str__(self)  # as it was given: a KeyError's would show it in quotes
        half = LONGEST_MESSAGE // 2
        return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} [...] {message[-half:]}"


class InputError(SAEError, ValueError):
    """An argument has a value that cannot be used."""


class UnknownNameError(InputError, KeyError):
    """A name is not among the known ones."""


class ShapeError(SAEError, ValueError):
    """A tensor does not have the shape that the SAE or the model needs."""


class LatentIndexError(SAEError, IndexError):
    """A latent index is outside ``0 .. d_sae - 1``."""


class CheckpointError(SAEError, ValueError):
    """A checkpoint is incomplete, broken, or holds something else than its configuration says."""


class MissingFileError(SAEError, FileNotFoundError):
    """A file or folder that a checkpoint needs is not there."""


class SiteError(SAEError, LookupError):
    """A site does not exist in this model, or could not be proven."""


class AttachError(SAEError, RuntimeError):
    """Interventions cannot be attached to, or did not act on, a model."""


class TrainingError(SAEError, RuntimeError):
    """A training run cannot go on."""


class PublishError(SAEError, RuntimeError):
    """An SAE cannot be published as asked."""


class VersionError(SAEError, ImportError):
    """Another library is installed in a version that this one is not tested with."""


def reason(error: BaseException) -> str:
    """Return why something failed, in the system's own words if it was the system that said no."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__
    return str(error)


def did_you_mean(given: object, known: Iterable[object], *, most: int = 3) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for the known names close to `given`, or an empty string.

    Args:
        given: what the caller wrote.
        known: the names that would have worked.
        most: at most this many suggestions.
    """
    wanted = str(given).lower()
    names = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(wanted, names, n=most, cutoff=0.6)
    if not close and "/" not in wanted:  # a repository, named without its owner
        tails = {name.rpartition("/")[2]: name for name in names if "/" in name}
        close = [tails[match] for match in difflib.get_close_matches(wanted, tails, n=most, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(names[match]) for match in close)}?" if close else ""


def unknown_name(
    kind: str, given: object, known: Iterable[object], *, error: type[SAEError] = UnknownNameError
) -> SAEError:
    """Build the error for a name that is not known: it lists close matches, else the known names.

    Args:
        kind: what the name stands for, such as ``"architecture"``.
        given: what the caller wrote.
        known: the names that would have worked.
        error: class of the error.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(str(name) for name in known)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return error(f"Unknown {kind} {given!r}.{did_you_mean(given, names)} Known: {shown or 'none'}.")


_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = _short.maxother = 300


def shown(value: object, most: int = 80) -> str:
    """Return a foreign value as a message shows it: short, however large the value, and however often it holds itself.

    Args:
        value: what a file held.
        most: at most this many characters.

    >>> shown([[[["deep"]]]])
    '[[[...]]]'
    """
    try:
        return _short.repr(value)[:most]
    except ValueError:  # a number of too many digits
        return f"a {type(value).__name__} too large to show"
