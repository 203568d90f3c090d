"""The content of the loopback Hub, read without HTTP."""

from __future__ import annotations

from .mini_hub import MiniHub


def files(hub: MiniHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """Return the content of a repository."""
    commit = hub.repo(repo_id).at(revision)
    return {path: hub.blob(file.sha256).read_bytes() for path, file in commit.files.items()}


def commits(hub: MiniHub, repo_id: str, revision: str = "main") -> list[str]:
    """Return the titles of a branch's commits, the newest first, without the Hub's own first commit."""
    repo = hub.repo(repo_id)
    titles, commit = [], repo.at(revision)
    while commit.parent is not None:
        titles.append(commit.title)
        commit = repo.commits[commit.parent]
    return titles
