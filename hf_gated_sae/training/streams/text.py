"""Text: documents in a fixed order that can be read repeatedly, from any position, and by several processes.

Plain text is read here rather than by `datasets`: that library is optional, and its `text` builder yields other
documents (it keeps empty lines, and a line of spaces does not end a paragraph), so that started runs would resume on
other text. Tables and Hub data sets are read by `datasets`, see `dataset.py`.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import hashlib
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...errors import CheckpointError, InputError, MissingFileError, shown, unknown_name
from .base import State, require_rank

SPLITS = ("file", "paragraph", "line")

PACKED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Functions that open compressed text, by suffix."""


class Text(ABC):
    """Documents in a fixed order.

    Args:
        name: of the text in messages.

    Attributes:
        rank: of the process that reads this part.
        world_size: number of processes.
    """

    rank, world_size = 0, 1

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def everything(self) -> Iterable[Any]:
        """Return all documents, including those of other processes."""

    def documents(self, start: int = 0) -> Iterator[Any]:
        """Yield this process's documents, beginning with index `start` of them."""
        yield from islice(iter(self.everything()), self.rank + start * self.world_size, None, self.world_size)

    def shard(self, rank: int, world_size: int) -> Text:
        """Return the text with documents `rank`, `rank + world_size`, ... of this one."""
        require_rank(rank, world_size)
        part = copy.copy(self)
        part.rank, part.world_size = self.rank + self.world_size * rank, self.world_size * world_size
        return part

    def open(self, state: State | None = None) -> TextReader:
        """Return a reader of this process's documents.

        Args:
            state: from `TextReader.state_dict`, to continue from its position.
        """
        return TextReader(self, state)


class TextReader:
    """Reads a few documents at a time, with a position that can be saved.

    A position is the number of documents read and the digests of the latest ones, which show whether the text has
    changed in the meantime.

    Args:
        text: to read.
        state: saved position to continue from; earlier documents are skipped without being checked.

    Raises:
        CheckpointError: if the text is not what it was.
    """

    def __init__(self, text: Text, state: State | None = None) -> None:
        self.text = text
        self.count = 0
        self._digests: list[str] = []
        self._documents = text.documents()
        if state is not None and state["documents"]:
            self._restore(state)

    def take(self, most: int) -> list[str]:
        """Return up to `most` of the next documents; none at the end.

        Raises:
            InputError: for a document that is not a string.
        """
        documents: list[str] = []
        digests: list[str] = []
        for document in islice(self._documents, most):
            digests.append(_digest(document, self.count + len(documents), self.text.name))
            documents.append(document)
        self.count += len(documents)
        self._digests = digests or self._digests
        return documents

    def state_dict(self) -> State:
        """Return the number of documents read, and the digests of the latest."""
        return {"documents": self.count, "latest": list(self._digests)}

    def _restore(self, state: State) -> None:
        self._restart(state["documents"] - len(state["latest"]))
        self.take(len(state["latest"]))
        if self._digests != state["latest"]:
            raise CheckpointError(
                f"The text ({self.text.name}) has changed: its documents up to number {state['documents']} differ "
                "from those read before the checkpoint. Resume with the text that the run was started with; a "
                "shuffled text needs a seed."
            )

    def _restart(self, start: int) -> None:
        self.count, self._digests, self._documents = start, [], self.text.documents(start)


class IterableText(Text):
    """Documents from an iterable of strings.

    Args:
        documents: strings that can be read again, such as a list; or a function that returns an iterable of them.
        name: of the text in messages.
    """

    def __init__(
        self, documents: Iterable[str] | Callable[[], Iterable[str]], *, name: str = "documents from Python"
    ) -> None:
        super().__init__(name)
        if isinstance(documents, (str, bytes, Mapping)) or not (
            callable(documents) or isinstance(documents, Iterable)
        ):
            raise InputError(
                f"Given {shown(documents)} as text; expected an iterable of strings, one per document: put a single "
                "text into a list."
            )
        self._given = documents

    def everything(self) -> Iterable[Any]:
        """Return all documents."""
        return self._given() if callable(self._given) else self._given


class TextFiles(Text):
    """Plain text files in UTF-8, which may be compressed (.gz, .bz2, .xz).

    Args:
        files: their paths, or a folder, whose ``.txt`` files are read in the order of their names.
        split: unit that is one document: a ``"file"``, a ``"paragraph"`` (up to an empty line) or a ``"line"`` that is
            not empty. A file that is one document is read into memory as a whole.

    Raises:
        MissingFileError: if a file or folder does not exist.
        InputError: if the folder has no text files; while reading, if a file is not UTF-8.
    """

    def __init__(
        self, files: str | Path | Sequence[str | Path], *, split: Literal["file", "paragraph", "line"] = "file"
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split of text files", split, SPLITS)
        given = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
        self.files: list[Path] = []
        for path in given:
            if not path.exists():
                raise MissingFileError(f"There is no {path}; expected a text file, or a folder of text files.")
            self.files += visible_files(path, [".txt"]) if path.is_dir() else [path]
        where = ", ".join(map(str, given[:3]))
        super().__init__(where)
        self.split = split
        if not self.files:
            raise InputError(f"There are no .txt files in {where or 'the list given'}; expected at least one.")

    def everything(self) -> Iterator[str]:
        """Yield all documents."""
        for path in self.files:
            try:
                with PACKED.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8") as file:
                    yield from [file.read()] if self.split == "file" else _pieces(file, self.split)
            except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise InputError(
                    f"{path} cannot be read as text in UTF-8 ({error}): convert it, or remove it."
                ) from error


def visible_files(folder: Path, suffixes: Iterable[str] | None = None) -> list[Path]:
    """Return the files below a folder whose path has no hidden part, in the order of their names."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    shown_ = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return shown_ if suffixes is None else [path for path in shown_ if path.suffix.lower() in suffixes]


def _pieces(lines: Iterable[str], split: str) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if split == "line":
            if line.strip():  # otherwise one of several processes might read empty lines only
                yield line.removesuffix("\n")
        elif line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _digest(document: Any, number: int, name: str) -> str:
    """Return a short digest of a document.

    Raises:
        InputError: if it is not a string.
    """
    if not isinstance(document, str):
        raise InputError(
            f"Document {number} of the text ({name}) is {shown(document)}; expected a string. Remove such documents, "
            "or give the column that holds the text."
        )
    try:
        encoded = document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"Document {number} of the text ({name}) is not valid Unicode ({error}): repair it, or remove it."
        ) from error
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()
