"""A place that holds checkpoint files: a local folder, or a folder of a Hub repository at one commit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, InputError, MissingFileError, did_you_mean

SHOWN_FILES = 12
JSON_LIMIT = 64 * 1024 * 1024


def clean_subfolder(subfolder: str) -> str:
    """Return `subfolder` without leading and trailing slashes.

    Raises:
        InputError: if it is absolute in disguise or climbs out of the repository.

    >>> clean_subfolder("layer_12/width_16k/")
    'layer_12/width_16k'
    """
    parts = PurePosixPath(str(subfolder).strip("/")).parts
    if ".." in parts or "\\" in str(subfolder):
        raise InputError(
            f"Given subfolder {subfolder!r}; expected a folder inside the repository, such as 'layer_12'."
        )
    return "/".join(part for part in parts if part != ".")


class Location(ABC):
    """A folder at one commit, with the relative paths of its files; all reading goes through it.

    Attributes:
        repo: repository id or folder, as the user wrote it.
        subfolder: folder inside it, empty for the root.
        revision: the commit; None for a local folder.
    """

    def __init__(self, repo: str, subfolder: str, revision: str | None, all_files: Sequence[str]) -> None:
        self.repo = repo
        self.subfolder = subfolder
        self.revision = revision
        self._all_files = all_files

    @property
    def files(self) -> list[str]:
        """Paths of the files below this folder, relative to it, sorted."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return sorted(path[len(prefix) :] for path in self._all_files if path.startswith(prefix))

    @property
    def folders(self) -> list[str]:
        """Paths of the folders below this one, relative to it, sorted."""
        return sorted({str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."})

    def __contains__(self, name: object) -> bool:
        """Whether the folder has a file of that relative path."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return f"{prefix}{name}" in self._all_files

    def __str__(self) -> str:
        """Return the name to use in messages."""
        place = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{place}@{self.revision[:12]}" if self.revision else place

    def at(self, subfolder: str) -> Location:
        """Return the folder `subfolder`, counted from the root of the same repository at the same commit."""
        return self._copy(clean_subfolder(subfolder))

    def fetch(self, names: Iterable[str]) -> Path:
        """Make files available on this machine.

        Args:
            names: paths relative to this folder.

        Returns:
            The local folder below which they lie under those names.

        Raises:
            MissingFileError: if one is not in the listing, or cannot be downloaded.
        """
        names = list(names)
        for name in names:
            if name not in self:
                raise MissingFileError(
                    f"There is no {name} in {self}.{did_you_mean(name, self.files)} It holds {self.listing()}: "
                    "the checkpoint is incomplete, upload or fetch it again."
                )
        return self._fetch(names)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of one (small) file."""
        return (self.fetch([name]) / name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object that a JSON file holds.

        Raises:
            CheckpointError: if the file is not a JSON object, or too large to be a description.
        """
        path = self.fetch([name]) / name
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise CheckpointError(f"{name} of {self} has {size} bytes; expected a small JSON file.")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{name} of {self} is not valid JSON ({error}): fetch or convert it again."
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{name} of {self} holds a JSON {type(content).__name__}; expected an object.")
        return content

    def listing(self) -> str:
        """Return the first files for a message, such as ``README.md, config.json, ... (40 files)``."""
        files = self.files
        shown = ", ".join(files[:SHOWN_FILES]) or "no files"
        return f"{shown}, ... ({len(files)} files)" if len(files) > SHOWN_FILES else shown

    @abstractmethod
    def _copy(self, subfolder: str) -> Location:
        """Return the same place with another subfolder."""

    @abstractmethod
    def _fetch(self, names: list[str]) -> Path:
        """Make listed files available and return the local folder."""


class LocalFolder(Location):
    """A folder on this machine."""

    def __init__(self, repo: str, subfolder: str = "", all_files: Sequence[str] | None = None) -> None:
        self.root = Path(repo).expanduser()
        if all_files is None:
            all_files = [
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.root).parts[:-1])
            ]
        super().__init__(repo, subfolder, None, all_files)

    def _copy(self, subfolder: str) -> LocalFolder:
        return LocalFolder(self.repo, subfolder, self._all_files)

    def _fetch(self, names: list[str]) -> Path:
        return self.root / self.subfolder


def locate(
    repo: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Location:
    """Find a local folder or pin a Hub repository to a commit; a local folder wins.

    Args:
        repo: folder, repository id, or ``repository@revision``.
        revision: branch, tag, ``refs/pr/1`` or commit.
        token: access token; None uses the stored one, False none.
        cache_dir: folder of the Hub cache.
        local_files_only: use only what is cached; also implied by ``HF_HUB_OFFLINE=1``.
        force_download: download even what is cached.

    Returns:
        The root of the place.

    Raises:
        InputError: if `repo` is neither an existing folder nor a possible repository id.
        MissingFileError: if there is no such folder, repository or revision, or it cannot be reached.
    """
    path = Path(repo).expanduser()
    if path.is_dir():
        return LocalFolder(repo)
    if path.is_file():
        raise InputError(f"{repo} is a file; expected the folder that holds it: pass {str(path.parent)!r}.")
    from .repository import HubRepository  # huggingface_hub's client, which a local folder does not need

    return HubRepository.resolve(
        repo,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
