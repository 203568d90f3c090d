"""Converting a whole repository of another library's checkpoints to the native layout, one commit per SAE.

It can be interrupted at any time. Progress is read from the target alone: an SAE is done if its provenance there names
the same commit of the source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..catalog import SAESet
from ..errors import InputError, PublishError
from ..formats.native import native_folders
from ..hub.error_messages import explained
from ..hub.location import clean_subfolder
from ..storage import TENSOR_FILES
from ..storage.atomic_write import FACTS_FILE
from .conversion import ROOT, Conversion, given_licence
from .markdown import decoded
from .repository_index import INDEX_FILE, conversion_of, read_index


@dataclass(frozen=True)
class Step:
    """One SAE of a mirror.

    Attributes:
        address: folder or file in the source.
        folder: in the target.
        state: ``"missing"``; ``"done"``; ``"outdated"``, if the target has it from another commit or in another dtype;
            ``"taken"``, if its folder holds another SAE.
    """

    address: str
    folder: str
    state: str


class Mirror:
    """Converts all SAEs of a repository and publishes them in another.

    Args:
        source: the SAEs to convert, of one commit.
        target: repository id, created if needed.
        folder: folder inside the target.
        dtype: of the stored weights; None for that of the source.
        license: licence of the Hub's list, for a source that states none; see `hub.licences.normalise`.
        license_name: name of a licence ``"other"``.
        license_link: address or file of a licence ``"other"``.
        private: whether a target that has to be created is private.
        revision: branch of the target to commit to.
        token: access token; None uses the stored one.

    Raises:
        InputError: if the source is not a repository on the Hub, two of its SAEs would go into the same folder, or the
            licence is not on the Hub's list.
    """

    def __init__(
        self,
        source: SAESet,
        target: str,
        *,
        folder: str = "",
        dtype: str | None = None,
        license: str | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        if source.revision is None:
            raise InputError(
                f"{source.repo} is a folder on this machine, not pinned to a commit: a mirror of it could be neither "
                "verified nor resumed. Pass the repository id of the original."
            )
        if source.repo.lower() == target.lower():
            raise InputError(f"Source and target are both {target}; mirror into another repository.")
        self.source = source
        self.target = target
        self.dtype = dtype
        self.licence = given_licence(license, license_name, license_link)
        self.private = private
        self.revision = revision
        self.token = token
        self._folders = _folders(source.addresses, clean_subfolder(folder))

    def plan(self) -> list[Step]:
        """Return the state of every SAE in the target.

        Raises:
            PublishError: if the target's index cannot be read.
        """
        converted = _converted(self.target, self.revision, self.token)
        origin = f"{self.source.repo}@{self.source.revision}"
        steps = []
        for address, folder in self._folders.items():
            found = converted.get(folder)
            if found is None:
                state = "missing"
            elif (found.get("converted from", "").partition("@")[0], found.get("address")) != (
                self.source.repo,
                address or ROOT,
            ):
                state = "taken"
            else:
                same = found["converted from"] == origin and self.dtype in (None, found.get("dtype"))
                state = "done" if same else "outdated"
            steps.append(Step(address, folder, state))
        return steps

    def publish(self, step: Step) -> CommitInfo:
        """Convert one SAE and publish it in one commit.

        Raises:
            CheckpointError: if it cannot be converted.
            InputError: if it is already in the native layout, or its folder in the target holds another SAE.
            MissingFileError: if it cannot be downloaded.
            PublishError: if it may not be published, or the target changed meanwhile.
        """
        if step.state == "taken":
            raise InputError(
                f"{self.target} has another SAE in {step.folder or 'its root'}, which is not a conversion of "
                f"{step.address or 'this'}: pass another folder=, or remove it."
            )
        conversion = Conversion(self.source.location.at(step.address), dtype=self.dtype, licence=self.licence)
        return conversion.push(
            self.target, subfolder=step.folder, revision=self.revision, private=self.private, token=self.token
        )


def _folders(addresses: list[str], parent: str) -> dict[str, str]:
    """Return the folder of every SAE: its address, without the suffix if that is a file.

    Raises:
        InputError: if two would share one.
    """
    found = {}
    for address in addresses:
        path = PurePosixPath(address)
        own = str(path.with_suffix("")) if path.suffix in TENSOR_FILES else address
        found[address] = "/".join(part for part in (parent, own) if part)
    for folder, number in Counter(found.values()).items():
        if number > 1:
            same = [address for address, other in found.items() if other == folder]
            raise InputError(f"{' and '.join(same)} would both go into {folder!r}: mirror them one by one.")
    return found


def _converted(repo: str, revision: str | None, token: str | bool | None) -> dict[str, Mapping[str, str]]:
    """Return the origins of the SAEs of a target, by folder; the entry of an SAE of unknown origin is empty.

    Raises:
        PublishError: if a file of the target cannot be read.
    """
    api = HfApi(token=token)
    with explained(repo, revision):
        try:
            info = api.model_info(repo, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return {}
    files = {file.rfilename for file in info.siblings or []}

    def read(path: str) -> str | None:
        if path not in files:
            return None
        with explained(repo, info.sha, path):
            local = hf_hub_download(repo, path, revision=info.sha, token=token)
        return decoded(Path(local).read_bytes(), f"{path} of {repo}")

    index = read_index(read(INDEX_FILE))
    found: dict[str, Mapping[str, str]] = {}
    for folder in native_folders(files):
        if folder in index:
            found[folder] = conversion_of(index[folder].get("conversion"))
        else:
            found[folder] = conversion_of(_provenance(read("/".join(part for part in (folder, FACTS_FILE) if part))))
    return found


def _provenance(text: str | None) -> Any:
    """Return the provenance in the text of a facts file."""
    try:
        facts = json.loads(text or "{}")
    except ValueError as error:
        raise PublishError(f"A {FACTS_FILE} of the target cannot be read ({error}): correct or delete it.") from error
    return facts.get("provenance") if isinstance(facts, dict) else None
