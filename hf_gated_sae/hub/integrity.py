"""Check cached files against the hashes that the Hub announces; the Hub's client does not.

The Hub's cache names a file by the hash of its content: sha256 for large files, git's sha1 for small ones. Each file
is hashed once. A marker beside the cache's blobs records its size and modification time, so that later loads cost a
`stat`; `HfApi.verify_repo_checksums` would hash every cached file of the repository, and ask the Hub, at each load.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

MARKERS = ".hf_gated_sae"
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
CHUNK = 1 << 22


def is_intact(cached: Path, announced: Callable[[], str | None] = lambda: None) -> bool:
    """Whether a file of the Hub cache has the content that the Hub announces.

    Args:
        cached: the file, or the link to it.
        announced: requests the hash from the Hub; called once, and only if the cache does not name the file by its
            hash, as in caches without links. If it returns None, the file is not checked.
    """
    blob = cached.resolve()
    by_name = _HASH.fullmatch(blob.name) is not None
    repository = next((folder for folder in cached.parents if folder.name.startswith("models--")), blob.parent)
    path_digest = hashlib.sha256(str(cached).encode()).hexdigest()[:32]
    marker = repository / MARKERS / (blob.name if by_name else f"unlinked-{path_digest}")
    try:
        state = blob.stat()
    except FileNotFoundError:  # another process has removed it as corrupt
        return False
    seen = f"{state.st_size} {state.st_mtime_ns}"
    try:
        if marker.read_text() == seen:
            return True
    except OSError:
        pass
    expected = blob.name if by_name else announced()
    if expected is None or not _HASH.fullmatch(expected):
        return True
    try:
        if _hash(blob, expected) != expected:
            return False
    except FileNotFoundError:
        return False
    try:
        marker.parent.mkdir(exist_ok=True)
        partial = marker.with_name(f"{marker.name}.{os.getpid()}")
        partial.write_text(seen)
        partial.replace(marker)
    except OSError:
        pass  # in a read-only cache the file is hashed every time
    return True


def _hash(blob: Path, expected: str) -> str:
    """Return the hash of a file, of the same kind as `expected`."""
    digest = hashlib.sha256()
    if len(expected) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
