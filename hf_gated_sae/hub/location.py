"""A location of checkpoint files: a local folder, or a folder of a Hub repository at one commit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..errors import CheckpointError, InputError, MissingFileError, did_you_mean
from ..storage import LFS, LFS_POINTER, ByteSource, Content, LocalBytes, StoredTensor, flat, read_content
from .origin import Origin

SHOWN_FILES = 12
JSON_LIMIT = 4 * 1024 * 1024
YAML_LIMIT = 256 * 1024  # smaller than for JSON, as yaml parses slowly


_YAML_ERRORS = (RecursionError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError)
"""Errors that yaml raises, beside its own, on values that do not fit their tags."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses merge keys, with which nested aliases can exhaust the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys are not read here", node.start_mark)


def clean_subfolder(subfolder: str) -> str:
    """Return `subfolder` without leading and trailing slashes.

    Raises:
        InputError: if it contains ``..`` or a backslash.

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
        file: the selected file, for layouts with several SAEs in a folder; else None.
    """

    def __init__(
        self,
        repo: str,
        subfolder: str,
        revision: str | None,
        all_files: Sequence[str],
        file: str | None = None,
    ) -> None:
        self.repo = repo
        self.subfolder = subfolder
        self.revision = revision
        self.file = file
        self._all_files = all_files
        self._contents: dict[str, Content] = {}
        self._broken: dict[str, CheckpointError] = {}  # parsed once: every layout may ask, and parsing may take long

    @property
    def address(self) -> str:
        """Path from the root to the selected file, else to the folder."""
        return "/".join(part for part in (self.subfolder, self.file) if part)

    @property
    def repo_id(self) -> str:
        """``owner/name`` of the repository; for a local folder, a guess from the end of its path."""
        return self.repo

    @cached_property
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
        """Return the repository, address and short commit, for messages."""
        path = f"{self.repo}/{self.address}" if self.address else self.repo
        return f"{path}@{self.revision[:12]}" if self.revision else path

    def at(self, address: str) -> Location:
        """Return another folder or file of the same repository and commit; `address` is a path from the root."""
        path = clean_subfolder(address)
        folder, _, file = path.rpartition("/") if path in self._all_files else (path, "", None)
        found = self._copy(folder, file)
        found._broken = self._broken
        return found

    def without_known_errors(self) -> Location:
        """Return the same location, on which files found broken before are parsed again; they may have been fixed."""
        return self._copy(self.subfolder, self.file)

    def fetch(self, names: Iterable[str]) -> Path:
        """Make files available on this machine.

        Args:
            names: paths relative to this folder.

        Returns:
            The local folder that contains them under those names.

        Raises:
            MissingFileError: if one is not in the listing, or cannot be downloaded.
        """
        names = list(names)
        self._require(names)
        return self._fetch(names)

    def _require(self, names: list[str]) -> None:
        """Raise for a name that is not in the listing."""
        for name in names:
            if name not in self:
                raise MissingFileError(
                    f"There is no {name} in {self}.{did_you_mean(name, self.files)} It has {self.listing()}: "
                    "the checkpoint is incomplete; upload or fetch it again."
                )

    def origin(self, layout: str, files: Iterable[str]) -> Origin:
        """Return the record of an SAE's location.

        Args:
            layout: name of the format.
            files: the files of the SAE, relative to this folder.
        """
        return Origin(self.repo, self.address, self.revision, layout, tuple(files))

    def source(self, name: str) -> ByteSource:
        """Return a file that can be read in part; a remote one is read by ranges until it is needed whole.

        Raises:
            MissingFileError: if it is not in the listing.
        """
        self._require([name])
        return self._source(name)

    def content(self, name: str) -> Content:
        """Return the content of a tensor file; only headers of tensors are read, once.

        Raises:
            CheckpointError: if it is broken.
            MissingFileError: if it is not in the listing, or cannot be read.
        """
        if name not in self._contents:
            with self._once(name):
                self._contents[name] = read_content(self.source(name), name)
        return self._contents[name]

    @contextmanager
    def _once(self, name: str) -> Iterator[None]:
        """Record the error of a broken file, and raise it at once if the file is already known to be broken."""
        path = f"{self.subfolder}/{name}"
        if path in self._broken:
            raise self._broken[path]
        try:
            yield
        except CheckpointError as error:
            self._broken[path] = error
            raise

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        """Return the tensors of a file that contains nothing else.

        Raises:
            CheckpointError: if it is broken, or contains something else.
            MissingFileError: if it is not in the listing, or cannot be read.
        """
        return flat(self.content(name), f"{name} of {self}")

    def read_bytes(self, name: str) -> bytes:
        """Return the content of one (small) file."""
        return (self.fetch([name]) / name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file.

        Raises:
            CheckpointError: if the file is not a JSON object, or larger than `JSON_LIMIT`.
        """
        with self._once(name):
            try:
                content = json.loads(self._description(name, JSON_LIMIT))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(
                    f"{name} of {self} is not valid JSON ({str(error)[:200]}): fetch or convert it again."
                ) from error
            if not isinstance(content, dict):
                raise CheckpointError(f"{name} of {self} holds a JSON {type(content).__name__}; expected an object.")
        return content

    def listing(self) -> str:
        """Return the first files for a message, such as ``README.md, config.json, ... (40 files)``."""
        files = self.files
        shown = ", ".join(files[:SHOWN_FILES]) or "no files"
        return f"{shown}, ... ({len(files)} files)" if len(files) > SHOWN_FILES else shown

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Return the mapping in a YAML file.

        Raises:
            CheckpointError: if the file is not a YAML mapping, or larger than `YAML_LIMIT`.
        """
        with self._once(name):
            try:
                content = yaml.load(self._description(name, YAML_LIMIT), _PlainLoader)
            except (yaml.YAMLError, ValueError, *_YAML_ERRORS) as error:
                raise CheckpointError(
                    f"{name} of {self} is not valid YAML ({str(error)[:200]}): fetch it again."
                ) from error
            if not isinstance(content, dict):
                raise CheckpointError(f"{name} of {self} holds a YAML {type(content).__name__}; expected a mapping.")
        return content

    def _description(self, name: str, limit: int) -> bytes:
        """Return the content of a small file, such as a configuration; a large one is refused."""
        path = self.fetch([name]) / name
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{name} of {self} has {size} bytes; expected at most {limit}.")
        content = path.read_bytes()
        if content.startswith(LFS):
            raise CheckpointError(f"{name} of {self} {LFS_POINTER}")
        return content

    @abstractmethod
    def sibling(self, repo: str, revision: str | None = None) -> Location:
        """Return the root of another repository that this one refers to, pinned and accessed in the same way.

        Args:
            repo: ``owner/name``.
            revision: branch, tag or commit of it.

        Raises:
            MissingFileError: if it cannot be reached.
        """

    @abstractmethod
    def _copy(self, subfolder: str, file: str | None) -> Location:
        """Return the same repository and commit with another subfolder and selected file."""

    @abstractmethod
    def _source(self, name: str) -> ByteSource:
        """Return a file that is in the listing."""

    @abstractmethod
    def _fetch(self, names: list[str]) -> Path:
        """Make listed files available and return the local folder."""


class LocalFolder(Location):
    """A folder on this machine."""

    def __init__(
        self,
        repo: str,
        subfolder: str = "",
        all_files: Sequence[str] | None = None,
        file: str | None = None,
        access: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = Path(repo).expanduser()
        self._access = {
            "token": None,
            "cache_dir": None,
            "local_files_only": False,
            "force_download": False,
            **(access or {}),
        }
        if all_files is None:
            all_files = [
                path.relative_to(self.root).as_posix()
                for path in self.root.rglob("*")
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.root).parts[:-1])
            ]
        super().__init__(repo, subfolder, None, all_files, file)

    def _copy(self, subfolder: str, file: str | None) -> LocalFolder:
        return LocalFolder(self.repo, subfolder, self._all_files, file, self._access)

    def sibling(self, repo: str, revision: str | None = None) -> Location:
        """Return another repository: the folder ``../../owner/name``, if there is one, else the one on the Hub.

        A local folder has no revisions, so with a `revision` the repository is always taken from the Hub.
        """
        beside = self.root.absolute().parent.parent / repo
        if revision is None and beside.is_dir():
            return LocalFolder(str(beside), access=self._access)
        from .repository import HubRepository  # huggingface_hub's client

        return HubRepository.resolve(repo, revision=revision, **self._access)

    @property
    def repo_id(self) -> str:
        """The owner and name at the end of the path, or in the path's Hub cache folder."""
        path = self.root.absolute()
        for folder in (path, *path.parents):
            if folder.name.startswith("models--"):
                return folder.name.removeprefix("models--").replace("--", "/")
        return "/".join(path.parts[-2:])

    def _source(self, name: str) -> ByteSource:
        return LocalBytes(self.root / self.subfolder / name, f"{name} of {self}")

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
        local_files_only: use only cached files; also implied by ``HF_HUB_OFFLINE=1``.
        force_download: download files even if they are cached.

    Returns:
        The root of the folder or repository.

    Raises:
        InputError: if `repo` is neither an existing folder nor a possible repository id.
        MissingFileError: if there is no such folder, repository or revision, or it cannot be reached.
    """
    if not repo.strip():
        raise InputError(f"Given {repo!r} as the repository; expected 'owner/name' or a folder ('.' for this one).")
    path = Path(repo).expanduser()
    access: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    if path.is_dir():
        return LocalFolder(repo, access=access)
    if path.is_file():
        raise InputError(f"{repo} is a file; expected the folder that holds it: pass {str(path.parent)!r}.")
    from .repository import HubRepository  # huggingface_hub's client, which a local folder does not need

    return HubRepository.resolve(repo, revision=revision, **access)
