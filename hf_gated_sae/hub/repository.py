"""A Hub repository at one commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError

from ..errors import CheckpointError, InputError, MissingFileError
from ..storage import ByteSource, LocalBytes
from .error_messages import TransportError, explained
from .integrity import is_intact
from .location import Location
from .remote import RemoteBytes

_log = logging.getLogger(__name__)

_repairing = threading.Lock()
"""Held while a corrupt file is replaced, so that one thread does not remove a file that another has just fetched."""


@dataclass(frozen=True)
class Access:
    """Settings for access to a repository.

    Attributes:
        token: access token; None uses the stored one, False none.
        cache_dir: folder of the Hub cache.
        offline: use only cached files.
        force_download: download files even if they are cached.
    """

    token: str | bool | None = None
    cache_dir: str | None = None
    offline: bool = False
    force_download: bool = False


class HubRepository(Location):
    """A folder of a Hub repository at one commit."""

    def __init__(
        self,
        repo: str,
        subfolder: str,
        revision: str,
        all_files: Sequence[str],
        access: Access,
        file: str | None = None,
    ) -> None:
        super().__init__(repo, subfolder, revision, all_files, file)
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
        if access.offline and force_download:
            why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE=1"
            raise InputError(
                f"Given force_download=True, which downloads {repo} again, and {why}, which forbids downloads: "
                "omit one of them."
            )
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
                    refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                    if refused or force_download:  # cached files are not wanted
                        raise
                    # The client has already warned that it continues with cached files.
                    access = replace(access, offline=True)
            return cls(repo, "", commit, _cached(repo, commit, cache_dir), access)

    def _copy(self, subfolder: str, file: str | None) -> HubRepository:
        copy = HubRepository(self.repo, subfolder, self.revision or "", self._all_files, self.access, file)
        copy._fetched = self._fetched
        return copy

    def sibling(self, repo: str, revision: str | None = None) -> HubRepository:
        """Return another repository, accessed in the same way."""
        return HubRepository.resolve(
            repo,
            revision=revision,
            token=self.access.token,
            cache_dir=self.access.cache_dir,
            local_files_only=self.access.offline,
            force_download=self.access.force_download,
        )

    def listing(self) -> str:
        """Return the first files for a message; when offline, with the note that only cached files are listed."""
        cached = "; only cached files are listed, as the Hub was not contacted" if self.access.offline else ""
        return f"{super().listing()}{cached}"

    def _fetch(self, names: list[str]) -> Path:
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        found = [self.download(prefix + name) for name in names]
        return found[0].parents[names[0].count("/")] if found else Path()

    def _source(self, name: str) -> ByteSource:
        path = f"{self.subfolder}/{name}" if self.subfolder else name
        cached = try_to_load_from_cache(self.repo, path, cache_dir=self.access.cache_dir, revision=self.revision)
        if self.access.offline or (isinstance(cached, str) and not self.access.force_download):
            return LocalBytes(self.download(path), f"{self.repo}/{path}@{(self.revision or '')[:12]}")
        return RemoteBytes(self, path)

    def download(self, path: str) -> Path:
        """Return the local copy of one file, whose path is from the root; a file of a commit is downloaded once.

        Raises:
            CheckpointError: if the content does not have the hash that the Hub announces, after a second download.
            MissingFileError: if it cannot be downloaded.
        """
        if path not in self._fetched:
            local = self._download(path, self.access.force_download)
            intact = is_intact(local, lambda: self._announced(path))
            self._fetched[path] = local if intact else self._repaired(path, local)
        return self._fetched[path]

    def _repaired(self, path: str, local: Path) -> Path:
        """Download a corrupt file again, once."""
        with _repairing:
            if not self.access.offline and not is_intact(local, lambda: self._announced(path)):
                _log.warning("The cached %s of %s is corrupt; it is removed and fetched again.", path, self)
                local.resolve().unlink(missing_ok=True)
                local = self._download(path, force_download=True)
            if not is_intact(local, lambda: self._announced(path)):
                raise CheckpointError(
                    f"The content of {path} of {self} does not have the hash that the Hub announces: it is corrupt, "
                    "and nothing was loaded. Fetch it again with force_download=True while online."
                )
        return local

    def _announced(self, path: str) -> str | None:
        """Request the hash of a file from the Hub; None when offline."""
        if self.access.offline:
            return None
        with explained(self.repo, self.revision, path):
            url = hf_hub_url(self.repo, path, revision=self.revision)
            return get_hf_file_metadata(url, token=self.access.token).etag

    def _download(self, path: str, force_download: bool) -> Path:
        with explained(self.repo, self.revision, path):
            return Path(
                hf_hub_download(
                    self.repo,
                    path,
                    revision=self.revision,
                    token=self.access.token,
                    cache_dir=self.access.cache_dir,
                    local_files_only=self.access.offline,
                    force_download=force_download,
                )
            )


def _split(repo: str, revision: str | None) -> tuple[str, str | None]:
    """Split ``repository@revision``."""
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
    """Request the paths of all files at a commit from the Hub."""
    return [file.rfilename for file in api.model_info(repo, revision=commit).siblings or []]


def _cached(repo: str, commit: str, cache_dir: str | None) -> list[str]:
    """Return the paths of the cached files of a commit."""
    # An empty pattern: only the snapshot's folder is needed, whether or not it is complete.
    folder = Path(
        snapshot_download(repo, revision=commit, cache_dir=cache_dir, local_files_only=True, allow_patterns=[])
    )
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
