"""Is a cached file what the Hub says it is? The client does not ask.

The Hub's cache names a file's content by its hash: sha256 for large files, git's sha1 for small ones. A content is
hashed once; a marker beside the cache's blobs remembers its size and time, so that later loads cost a `stat`.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

MARKERS = ".hf_gated_sae"
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
CHUNK = 1 << 22


def is_intact(cached: Path) -> bool:
    """Whether a file of the Hub cache has the content that its name promises.

    Args:
        cached: the file, or the link to it. Where the cache does not name it by its hash there is nothing to compare
            with, and the answer is yes.
    """
    blob = cached.resolve()
    if not _HASH.fullmatch(blob.name):
        return True
    marker = blob.parent.parent / MARKERS / blob.name
    try:
        state = blob.stat()
    except FileNotFoundError:  # removed meanwhile, as corrupt, by somebody else
        return False
    seen = f"{state.st_size} {state.st_mtime_ns}"
    try:
        if marker.read_text() == seen:
            return True
    except OSError:
        pass
    if _hash(blob) != blob.name:
        return False
    try:
        marker.parent.mkdir(exist_ok=True)
        partial = marker.with_name(f"{marker.name}.{os.getpid()}")
        partial.write_text(seen)
        partial.replace(marker)
    except OSError:
        pass  # a cache that cannot be written to is checked every time
    return True


def _hash(blob: Path) -> str:
    """Return the hash of a content, of the kind that its name has."""
    digest = hashlib.sha256()
    if len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
