"""A Hub repository at one commit, and the sentences for everything that can go wrong on the way to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
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
from .location import Location

TransportError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]  # not in its __all__
"""Root of the errors of the HTTP library (httpx or httpx2) that the client is built on."""


@dataclass(frozen=True)
class Access:
    """How to reach a repository.

    Attributes:
        token: access token; None uses the stored one, False none.
        cache_dir: folder of the Hub cache.
        offline: use only what is cached.
        force_download: download even what is cached.
    """

    token: str | bool | None = None
    cache_dir: str | None = None
    offline: bool = False
    force_download: bool = False


class HubRepository(Location):
    """A folder of a Hub repository at one commit."""

    def __init__(self, repo: str, subfolder: str, revision: str, all_files: Sequence[str], access: Access) -> None:
        super().__init__(repo, subfolder, revision, all_files)
        self.access = access
        self._fetched: dict[str, Path] = {}

    @classmethod
    def resolve(
        cls,
        repo: str,
        *,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | None,
        local_files_only: bool,
        force_download: bool,
    ) -> HubRepository:
        """Pin a repository to the commit that `revision` names and list its files; see `hub.locate`."""
        repo, revision = _split(repo, revision)
        access = Access(token, cache_dir, local_files_only or is_offline_mode(), force_download)
        api = HfApi(token=token)
        with explained(repo, revision):
            resolved = api.resolve_revision(
                repo, revision=revision, cache_dir=cache_dir, local_files_only=access.offline, token=token
            )
            commit = resolved.resolved
            if not access.offline:
                try:
                    return cls(repo, "", commit, _listed(api, repo, commit), access)
                except TransportError as error:
                    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                        raise
                    # The client has already warned that it uses what is cached; so does this.
                    access = replace(access, offline=True)
            return cls(repo, "", commit, _cached(repo, commit, cache_dir), access)

    def _copy(self, subfolder: str) -> HubRepository:
        copy = HubRepository(self.repo, subfolder, self.revision or "", self._all_files, self.access)
        copy._fetched = self._fetched
        return copy

    def _fetch(self, names: list[str]) -> Path:
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        found = [self._fetch_one(prefix + name) for name in names]
        return found[0].parents[names[0].count("/")] if found else Path()

    def _fetch_one(self, path: str) -> Path:
        """Return the local copy of one file, asked for once: its commit does not change."""
        if path not in self._fetched:
            with explained(self.repo, self.revision, path):
                local = hf_hub_download(
                    self.repo,
                    path,
                    revision=self.revision,
                    token=self.access.token,
                    cache_dir=self.access.cache_dir,
                    local_files_only=self.access.offline,
                    force_download=self.access.force_download,
                )
            self._fetched[path] = Path(local)
        return self._fetched[path]


def _split(repo: str, revision: str | None) -> tuple[str, str | None]:
    """Take ``repository@revision`` apart."""
    name, at, named_revision = repo.partition("@")
    if at and revision not in (None, named_revision):
        raise InputError(f"Given {repo!r} and revision={revision!r}, which name two revisions; pass one of them.")
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in repo:
        raise MissingFileError(
            f"There is no folder {repo!r}, and it cannot be a Hub repository, whose name has the form 'owner/name'. "
            "Check the path; a folder inside a repository is the second argument, subfolder."
        )
    return name, named_revision if at else revision


def _listed(api: HfApi, repo: str, commit: str) -> list[str]:
    """Ask the Hub for all paths at a commit."""
    return [file.rfilename for file in api.model_info(repo, revision=commit).siblings or []]


def _cached(repo: str, commit: str, cache_dir: str | None) -> list[str]:
    """List what is cached of a commit."""
    # No pattern: the question is where the snapshot lies, not whether it is complete.
    folder = Path(
        snapshot_download(repo, revision=commit, cache_dir=cache_dir, local_files_only=True, allow_patterns=[])
    )
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@contextmanager
def explained(repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Turn the client's errors into one sentence that says what was asked for and what to do.

    Args:
        repo: repository id.
        revision: what the user asked for, or the commit.
        file: the file that is being fetched; None while the repository is being looked up.
    """
    place = f"{repo}@{revision}" if revision else repo
    what = f"{file} of {place}" if file else place
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
            f"See {_page(repo)}/tree/main for what there is."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise MissingFileError(
            f"{what} is not in the Hub cache, and the Hub could not be asked ({_reason(error)}). Load it once while "
            "online (HF_HUB_OFFLINE unset, local_files_only=False), or pass a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise MissingFileError(f"There is no {what} on the Hub; upload it, or check the name.") from error
    except (TransportError, OSError) as error:
        if file is None and isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
            raise _no_such_repository(repo) from error
        raise MissingFileError(
            f"{what} could not be fetched from the Hub ({_reason(error)}). Nothing was loaded; try again."
        ) from error


def _no_such_repository(repo: str) -> MissingFileError:
    return MissingFileError(
        f"There is neither a folder {repo!r} nor a model repository of that name on the Hub that you may see. "
        "Check the spelling; if it is private, pass token= or run `hf auth login`."
    )


def _page(repo: str) -> str:
    """Return the address of a repository's page."""
    return f"{HfApi().endpoint}/{repo}"


def _reason(error: Any) -> str:
    """Return the first line of an error, and of what it came from."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
