"""Resolving a run's revisions to commits."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ...errors import InputError
from ...hub.error_messages import TransportError


def commit_on_hub(name: str, revision: str | None, kind: Literal["model", "dataset"], key_path: str) -> str | None:
    """Return the current commit of a revision; offline, the revision unchanged.

    Args:
        name: id of the repository.
        revision: branch, tag or commit; None for the main branch.
        kind: of the repository.
        key_path: of the name in the run, for errors.

    Raises:
        InputError: if the Hub has no such repository or revision, or cannot be reached.
    """
    try:
        return HfApi().repo_info(name, revision=revision, repo_type=kind).sha
    except OfflineModeIsEnabled:
        return revision
    except (HfHubHTTPError, HFValidationError) as error:
        at = f" at {revision!r}" if revision else ""
        first = " ".join(str(error).strip().split("\n\n")[-1].split()) or type(error).__name__
        raise InputError(f"{key_path} {name!r}{at} cannot be opened on the Hub ({first}).") from error
    except TransportError as error:
        raise InputError(
            f"The Hub could not be reached to resolve {key_path} {name!r} to a commit ({error}); try again, or set "
            "HF_HUB_OFFLINE=1 to use the cache."
        ) from error
