"""Turn the Hub client's errors into messages that state the request, the cause and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import InputError, MissingFileError

TransportError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]  # not in its __all__
"""Base class of the errors of the HTTP library (httpx or httpx2) that the client uses."""


@contextmanager
def explained(repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Raise the client's errors as this package's, with a message that states the request and what to do.

    Args:
        repo: repository id.
        revision: the requested revision, or the commit.
        file: the file that is being fetched; None while the repository is being looked up.
    """
    pinned = f"{repo}@{revision}" if revision else repo
    what = f"{file} of {pinned}" if file else pinned
    try:
        yield
    except HFValidationError as error:
        raise InputError(
            f"There is no folder {repo!r}, and it cannot be a Hub repository, whose name has the form 'owner/name'."
        ) from error
    except GatedRepoError as error:
        raise MissingFileError(
            f"The repository {repo} is gated: accept its conditions at {_page(repo)} while logged in, then pass "
            "token= or run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise _no_such_repository(repo) from error
    except RevisionNotFoundError as error:
        raise MissingFileError(
            f"The repository {repo} has no revision {revision!r}; expected a branch, a tag, 'refs/pr/N' or a commit. "
            f"{_page(repo)}/tree/main lists the branches and tags."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise MissingFileError(
            f"{what} is not in the Hub cache, and the Hub could not be reached ({_reason(error)}). Load it once while "
            "online (HF_HUB_OFFLINE unset, local_files_only=False), or pass a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise MissingFileError(f"There is no {what} on the Hub; check the name, or upload it.") from error
    except (TransportError, OSError) as error:
        status = error.response.status_code if file is None and isinstance(error, HfHubHTTPError) else None
        if status == 404:
            raise _no_such_repository(repo) from error
        if status in (401, 403):
            raise MissingFileError(
                f"The Hub refuses {what} to this token ({_reason(error)}): the token may be mistyped, expired or lack "
                "read permission. Pass another token=, token=False for none, or run `hf auth login`."
            ) from error
        raise MissingFileError(
            f"{what} could not be fetched from the Hub ({_reason(error)}). Nothing was loaded; try again."
        ) from error


def _no_such_repository(repo: str) -> MissingFileError:
    return MissingFileError(
        f"There is neither a folder {repo!r} nor a model repository of that name on the Hub to which you have access. "
        "Check the spelling; if it is private, pass token= or run `hf auth login`."
    )


def _page(repo: str) -> str:
    """Return the address of a repository's page."""
    return f"{HfApi().endpoint}/{repo}"


def _reason(error: Any) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
