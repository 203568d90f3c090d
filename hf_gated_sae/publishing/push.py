"""Publishing an SAE on the Hub: one commit adds weights, configuration, facts and card, and deletes stale files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..errors import InputError, PublishError
from ..formats.native import native_folders
from ..hub.error_messages import TransportError
from ..hub.location import clean_subfolder
from ..modeling import SAEModel
from ..storage.atomic_write import FACTS_FILE, WEIGHT_FILES
from .facts import CardFacts, read_facts, write_facts
from .markdown import decoded, merge
from .repository_index import (
    INDEX_FILE,
    SECTION,
    conversion_of,
    entry,
    index_card,
    index_json,
    read_index,
    updated_index,
)
from .save_published import CARD_FILE, write_extras


def push_to_hub(
    sae: SAEModel,
    repo_id: str,
    *,
    subfolder: str = "",
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    facts: CardFacts | None = None,
    max_shard_size: int | str | None = None,
    endpoint: str | None = None,
) -> CommitInfo:
    """Publish an SAE in one commit.

    If the SAE is in a subfolder, so is its card, and the README in the root lists the SAEs of the repository. Only the
    marked section of an existing README is changed.

    Args:
        sae: the SAE.
        repo_id: ``owner/name``, or a name in your own namespace; created if needed.
        subfolder: folder inside the repository; the root by default.
        private: whether a repository that has to be created is private; an existing one is never changed.
        create_pr: open a pull request instead of committing.
        revision: branch to commit to, created if needed.
        token: access token; None uses the stored one.
        commit_message: first line of the commit.
        commit_description: the rest of it.
        facts: for the card; by default those stored with the checkpoint that `sae` was loaded from.
        max_shard_size: size above which the weights are written in several files.
        endpoint: address of the Hub; the public Hub by default.

    Returns:
        The commit: ``oid``, ``commit_url``, ``pr_url`` ...

    Raises:
        InputError: if the arguments contradict each other, or the facts name a licence that is not on the Hub's list.
        PublishError: if the repository cannot be written to, has changed meanwhile, or has an unreadable README.
    """
    _require_one_target(create_pr, revision)
    subfolder, facts = clean_subfolder(subfolder), (read_facts(sae) if facts is None else facts).licensed()
    saving: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with tempfile.TemporaryDirectory() as staging, _translated(repo_id):
        folder = Path(staging)
        # Written locally before the repository is created: if this fails, nothing changes on the Hub.
        sae.save_pretrained(folder, **saving)
        write_facts(facts, folder)
        target = _Target.prepare(HfApi(endpoint=endpoint, token=token), repo_id, private, revision)
        operations = _operations(target, sae, facts, folder, subfolder)
        return target.api.create_commit(
            target.repo_id,
            operations,
            commit_message=commit_message or _message(sae, subfolder),
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=target.commit,  # fails if the branch has changed since it was read
        )


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, endpoint: str | None = None
) -> str:
    """Create a repository if needed, before the SAE for it is made; return its full id.

    Args:
        repo_id: as for `push_to_hub`, like the following.
        private: whether a repository that has to be created is private.
        token: access token; None uses the stored one.
        endpoint: address of the Hub; the public Hub by default.

    Raises:
        PublishError: if it cannot be written to.
    """
    with _translated(repo_id):
        return _Target.prepare(HfApi(endpoint=endpoint, token=token), repo_id, private, None).repo_id


def _require_one_target(create_pr: bool, revision: str | None) -> None:
    """Raise if both a pull request and a branch are requested.

    Raises:
        InputError: with what to pass.
    """
    if create_pr and revision not in (None, "main"):
        raise InputError(
            f"Given create_pr=True and revision={revision!r}, but a pull request always goes to the main branch: pass "
            "one of them; to add to an open pull request, pass revision='refs/pr/N' alone."
        )


@dataclass(frozen=True)
class _Target:
    """The state of a repository before the commit.

    Attributes:
        api: client.
        repo_id: full id.
        commit: head of the branch.
        files: paths at that commit.
    """

    api: HfApi
    repo_id: str
    commit: str
    files: frozenset[str]

    @classmethod
    def prepare(cls, api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> _Target:
        """Create repository and branch if they do not exist, and list the files."""
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if private and not info.private:
            raise PublishError(
                f"Given private=True, but the repository {repo_id} exists and is public: make it private in its "
                "settings first, or publish without private=."
            )
        return cls(api, repo_id, str(info.sha), frozenset(file.rfilename for file in info.siblings or []))

    def read(self, path: str) -> str | None:
        """Return a text file at the commit; None if it does not exist.

        Raises:
            PublishError: if it is not in UTF-8.
        """
        if path not in self.files:
            return None
        local = hf_hub_download(
            self.repo_id, path, revision=self.commit, token=self.api.token, endpoint=self.api.endpoint
        )
        return decoded(Path(local).read_bytes(), f"{path} of {self.repo_id}")


def _operations(
    target: _Target, sae: SAEModel, facts: CardFacts, folder: Path, subfolder: str
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations of the commit; `folder` holds the saved SAE, and the other files are written into it."""
    prefix = f"{subfolder}/" if subfolder else ""
    write_extras(
        sae,
        folder,
        facts,
        existing_card=target.read(prefix + CARD_FILE),
        repo_id=target.repo_id,
        subfolder=subfolder,
    )
    new = {prefix + path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    stale = [
        path
        for path in sorted(target.files)
        if path.startswith(prefix) and WEIGHT_FILES.fullmatch(path[len(prefix) :]) and path not in new
    ]
    if subfolder:
        root = folder / "root"
        root.mkdir()
        new.update(_write_index(target, sae, facts, root, subfolder))
    return [
        *(CommitOperationAdd(path, str(source)) for path, source in new.items()),
        *(CommitOperationDelete(path) for path in stale),
    ]


def _write_index(target: _Target, sae: SAEModel, facts: CardFacts, folder: Path, subfolder: str) -> dict[str, Path]:
    """Write the root's README and index into `folder`; return them by their path in the repository."""

    def describe(other: str) -> dict[str, Any]:
        """Return the entry of an SAE that was published without an index."""
        config = _json(target.read(f"{other}/config.json"))
        known = _json(target.read(f"{other}/{FACTS_FILE}"))
        conversion = conversion_of(known.get("provenance"))
        architecture = str(config.get("model_type")).removesuffix("_sae")
        fields = {name: config.get(name) for name in ("base_model", "site", "d_in", "d_sae")}
        found = {"architecture": architecture, **fields, "metrics": known.get("metrics") or {}}
        return {**found, **({"conversion": conversion} if conversion else {})}

    folders = [found for found in native_folders(target.files) if found]
    entries = updated_index(read_index(target.read(INDEX_FILE)), folders, subfolder, entry(sae, facts), describe)
    card = merge(
        target.read(CARD_FILE),
        index_card(target.repo_id, entries, sae, facts),
        SECTION,
        yielding=("license", "datasets"),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    (folder / INDEX_FILE).write_text(index_json(entries), encoding="utf-8")
    return {CARD_FILE: folder / CARD_FILE, INDEX_FILE: folder / INDEX_FILE}


def _json(text: str | None) -> dict[str, Any]:
    """Return the object in a JSON text; empty if there is none, or it cannot be parsed."""
    try:
        content = json.loads(text or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _message(sae: SAEModel, subfolder: str) -> str:
    """Return the default first line of the commit."""
    at_site = f" at {sae.config.site}" if sae.config.site else ""
    return f"Upload {type(sae).__name__}{at_site}" + (f" to {subfolder}" if subfolder else "")


@contextmanager
def _translated(repo_id: str) -> Iterator[None]:
    """Convert the client's errors to errors of this package."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"Given repository {repo_id!r}; expected 'owner/name', such as 'me/my-sae'.") from error
    except RevisionNotFoundError as error:
        raise PublishError(
            f"The repository {repo_id} has no such revision to commit to: pass a branch or an open 'refs/pr/N'."
        ) from error
    except RepositoryNotFoundError as error:
        raise PublishError(
            f"The repository {repo_id} does not exist or is not visible with this token: check the name, and that "
            "the token has write access (`hf auth login`, or token=)."
        ) from error
    except HfHubHTTPError as error:
        raise PublishError(_explanation(repo_id, error)) from error
    except TransportError as error:
        raise PublishError(
            f"The Hub could not be reached while publishing {repo_id} ({error}); nothing was committed, try again."
        ) from error


def _explanation(repo_id: str, error: HfHubHTTPError) -> str:
    """Return the message for a request that the Hub refused."""
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The repository {repo_id} cannot be written to with this token: pass token= with write access to that "
            "owner, run `hf auth login`, or propose the change with create_pr=True."
        )
    if status == 412:
        return (
            f"The repository {repo_id} changed while this was being published; nothing was committed, publish again."
        )
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"The Hub refused to publish to {repo_id} ({first}); nothing was committed."
