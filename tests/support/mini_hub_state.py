# SPDX-License-Identifier: Apache-2.0
"""What a MiniHub holds: repositories with their commits, planned faults, and the errors that it answers with."""
import hashlib, json, re
from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import yaml


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_card(text):
    """The YAML block at the top of a README, as a dictionary. Raises ValueError when it is broken."""
    block = re.match(r"\A---\r?\n(.*?)\r?\n---\s*(\n|\Z)", text, re.S)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as e:
        raise ValueError(f"YAML Metadata Error: {e}".replace("\n", " "))
    if not isinstance(data or {}, dict) or not isinstance((data or {}).get("tags") or [], (list, str)):
        raise ValueError('YAML Metadata Error: metadata must be a mapping and "tags" an array or a string')
    return json.loads(json.dumps(data or {}, default=str))


def strings(value):
    return [str(v) for v in value] if isinstance(value, list) else [str(value)] if value else []


class HubError(Exception):
    """Becomes an HTTP error. huggingface_hub makes its own exception classes from `code`."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        self.headers.update({"X-Error-Code": code} if code else {})


Commit = namedtuple("Commit", "id parent title message author date files")  # files: {path: File}
# Content is the blob `sha256`; `oid` is the git id (of the pointer file, if in LFS); pointer: its size, 0 if not in LFS.
File = namedtuple("File", "size sha256 oid pointer")


def plan(match="", kind="", times=1, status=500, after=0, seconds=0.0, value="0" * 40, headers=()):
    return SimpleNamespace(match=match, kind=kind, times=times, status=status, after=after, seconds=seconds, value=value,
                           headers=dict(headers))


@dataclass
class Repo:
    type: str  # "models" or "datasets", as in URLs
    id: str
    private: bool = False
    gated: object = False  # False, "auto" or "manual"
    allowed: set = field(default_factory=set)  # users past the gate; the owners always are
    branches: dict = field(default_factory=dict)  # "main", "refs/pr/1", ... -> commit id
    tags: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    discussions: list = field(default_factory=list)
    downloads: int = 0
    likes: int = 0

    def at(self, revision):
        id_ = self.branches.get(revision) or self.tags.get(revision) or revision
        if id_ not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[id_]

    @property
    def path(self):
        return self.id if self.type == "models" else f"{self.type}/{self.id}"
