"""The record of where an SAE was loaded from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where an SAE was loaded from.

    Attributes:
        repo: repository id or folder.
        subfolder: the SAE's folder or file inside it, empty for the root.
        revision: commit that `repo` was pinned to; None for a local folder.
        format: name of the layout.
        files: the files that contain it, relative to its folder.
        folder: local folder of the files that were fetched whole; None if they were not.
        bytes_read: bytes read to load it; mapped tensors count with their full size.
        cache_dir: folder of the Hub cache; None for the default one.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None
    format: str = "native"
    files: tuple[str, ...] = ()
    folder: Path | None = None
    bytes_read: int = field(default=0, compare=False)
    cache_dir: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return the repository, subfolder and short commit, for messages."""
        path = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{path}@{self.revision[:12]}" if self.revision else path
