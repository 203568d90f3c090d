"""The errors of this package: one base class, and each is also the builtin error that a caller would expect.

A message states what was given, what was expected and what to do; unknown names get close matches.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST_MESSAGE = 2000


class SAEError(Exception):
    """Base class of the package's errors."""

    def __str__(self) -> str:
        """Return the message; only the start and end of a very long one, which may quote a file or an argument."""
        message = Exception.__str__(self)  # not KeyError's, which would show it in quotes
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
    """A checkpoint is incomplete, broken, or contradicts its configuration."""


class MissingFileError(SAEError, FileNotFoundError):
    """A file or folder that a checkpoint needs does not exist."""


class SiteError(SAEError, LookupError):
    """A site does not exist in this model, or could not be proven."""


class AttachError(SAEError, RuntimeError):
    """Interventions cannot be attached to, or did not act on, a model."""


class TrainingError(SAEError, RuntimeError):
    """A training run cannot continue."""


class PublishError(SAEError, RuntimeError):
    """An SAE cannot be published as asked."""


class VersionError(SAEError, ImportError):
    """Another library is installed in a version outside the tested range."""


def reason(error: BaseException) -> str:
    """Return an error's message, or that of the operating system, such as "No space left on device", if it has one."""
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
        most: maximum number of suggestions.
    """
    wanted = str(given).lower()
    names = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(wanted, names, n=most, cutoff=0.6)
    if not close and "/" not in wanted:  # a repository without its owner
        tails = {name.rpartition("/")[2]: name for name in names if "/" in name}
        close = [tails[match] for match in difflib.get_close_matches(wanted, tails, n=most, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(names[match]) for match in close)}?" if close else ""


def unknown_name(
    kind: str, given: object, known: Iterable[object], *, error: type[SAEError] = UnknownNameError
) -> SAEError:
    """Build the error for an unknown name; it lists close matches and the known names.

    Args:
        kind: the kind of name, such as ``"architecture"``.
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
    """Return a short representation of an untrusted value for messages, even of a huge or self-containing one.

    Args:
        value: a value from a file or a caller.
        most: maximum number of characters.

    >>> shown([[[["deep"]]]])
    '[[[...]]]'
    """
    try:
        return _short.repr(value)[:most]
    except ValueError:  # a number of too many digits
        return f"a {type(value).__name__} too large to show"
