"""The demo's corpus: the source of the Python standard library, which is on every machine that can run the demo.

Left out, with the reasons:

* tests, and code that is not part of the library (`site-packages`, `dist-packages`, site customisation): not present
  everywhere, or not Python's own;
* `idlelib` and `lib2to3`: applications that distributions package separately or that later versions dropped;
* generated tables (`encodings`, `pydoc_data`, `html/entities.py`, the build configuration): hundreds of kilobytes of
  literals would teach a small model nothing about Python, and the build configuration names the build machine.

Files are held out by their path, so the split is the same on every version of Python. Code that a version moved to
another file can therefore be in different splits of two versions; figures are exact on the version on which the model
was trained.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..errors import InputError, unknown_name

Split = Literal["training", "held_out"]

EXCLUDED_FOLDERS = frozenset(
    {
        *("test", "tests", "site-packages", "dist-packages", "__pycache__"),
        *("idlelib", "lib2to3"),
        *("encodings", "pydoc_data"),
    }
)
EXCLUDED_FILES = frozenset({"html/entities.py", "sitecustomize.py", "usercustomize.py"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")

HELD_OUT_ONE_IN = 10
"""One in `HELD_OUT_ONE_IN` files is held out, selected by the hash of its path."""


@lru_cache(maxsize=1)
def standard_library() -> Path:
    """Find the folder that holds the standard library's source.

    Returns:
        The folder, absolute.

    Raises:
        InputError: this Python ships its library without source (some frozen or embedded builds do).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "tokenize.py").is_file():
        raise InputError(
            f"The demo reads the source of the standard library, but {folder} has no tokenize.py. This Python seems "
            "to be an embedded or frozen build; run the demo with a regular installation of Python."
        )
    return folder


def _is_included(relative: str) -> bool:
    """Whether a file belongs to the corpus, determined by its relative posix path."""
    folders = relative.split("/")[:-1]
    if relative in EXCLUDED_FILES or relative.startswith(EXCLUDED_PREFIXES):
        return False
    return EXCLUDED_FOLDERS.isdisjoint(folders)


@lru_cache(maxsize=1)
def source_files() -> tuple[str, ...]:
    """List the corpus.

    Returns:
        Paths relative to `standard_library()`, posix, sorted; every one is readable as utf-8.

    Raises:
        InputError: this Python ships its library without source.
    """
    folder = standard_library()
    relative_paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    return tuple(sorted(path for path in relative_paths if _is_included(path) and _is_utf8(folder / path)))


def _is_utf8(path: Path) -> bool:
    """Whether a file can be read as utf-8; other files are not part of the corpus."""
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError):
        return False
    return True


def _path_hash(relative: str) -> bytes:
    """Hash a relative path; unlike `hash()`, the same in every process and on every Python."""
    return hashlib.sha256(relative.encode("utf-8")).digest()


def is_held_out(relative: str) -> bool:
    """Whether a file is held out, determined by its path, so that it is the same on every version of Python.

    Args:
        relative: posix path relative to the standard library, for example `"json/decoder.py"`.

    Returns:
        True for about one path in ten.
    """
    return int.from_bytes(_path_hash(relative)[:8], "big") % HELD_OUT_ONE_IN == 0


def training_files() -> tuple[str, ...]:
    """List the files the demo's models are trained on.

    Returns:
        Relative posix paths, sorted.
    """
    return tuple(path for path in source_files() if not is_held_out(path))


def held_out_files() -> tuple[str, ...]:
    """List the files on which the demo's models are evaluated and never trained.

    Returns:
        Relative posix paths, sorted.
    """
    return tuple(path for path in source_files() if is_held_out(path))


def files_of(split: Split) -> tuple[str, ...]:
    """List the files of one split.

    Args:
        split: `"training"` or `"held_out"`.

    Returns:
        Relative posix paths, sorted.

    Raises:
        UnknownNameError: the split is neither of the two.
    """
    listings = {"training": training_files, "held_out": held_out_files}
    if split not in listings:
        raise unknown_name("split", split, listings)
    return listings[split]()


def read(relative: str) -> str:
    """Read one file of the corpus.

    Args:
        relative: posix path relative to the standard library.

    Returns:
        Its text with newlines as `\\n` on every platform.
    """
    return (standard_library() / relative).read_text(encoding="utf-8")


def texts(split: Split, max_bytes: int | None = None) -> Iterator[str]:
    """Read the documents of a split in the order of their path hashes, so that any prefix is a random sample.

    Args:
        split: `"training"` or `"held_out"`.
        max_bytes: stop after this many bytes of utf-8 text; the last document is cut at the end of a line.

    Yields:
        One text per file; empty files are skipped.

    Raises:
        UnknownNameError: the split is neither of the two.
        InputError: `max_bytes` is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise InputError(f"max_bytes is {max_bytes}; expected a number of bytes of at least 0, or None for no limit.")
    remaining = max_bytes
    for relative in sorted(files_of(split), key=_path_hash):
        text = read(relative)
        if remaining is not None:
            encoded = text.encode("utf-8")
            if len(encoded) > remaining:
                yield from filter(None, [_whole_lines(encoded[:remaining])])
                return
            remaining -= len(encoded)
        if text:
            yield text


def _whole_lines(encoded: bytes) -> str:
    """Return the complete lines of a truncated document (truncating after a newline never splits a character)."""
    return encoded[: encoded.rfind(b"\n") + 1].decode("utf-8")


def corpus_digest(split: Split | None = None) -> str:
    """Return a digest of the text of the corpus, for cards and reports.

    Args:
        split: one split, or None for the whole corpus.

    Returns:
        sha256 in hexadecimal over every path and its newline-normalised content, in sorted order.

    Raises:
        UnknownNameError: the split is neither of the two.
    """
    digest = hashlib.sha256()
    for relative in source_files() if split is None else files_of(split):
        content = read(relative).encode("utf-8")
        # The lengths make the encoding unambiguous: different corpora never hash the same bytes.
        digest.update(f"{relative}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
