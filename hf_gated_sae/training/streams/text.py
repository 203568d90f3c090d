"""Text: documents in a fixed order, that can be read again, from any position, and by several processes.

Plain text is read here and not by `datasets`, which is an optional dependency, and whose `text` builder gives other
documents: an empty line is one, and a paragraph does not end at a line of spaces. Runs that were started would so not
resume on the same text; tables and data sets of the Hub, which need a library, are read by it (see `dataset.py`).
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
"""What opens compressed text, by the file's ending."""


class Text(ABC):
    """Documents in a fixed order.

    Args:
        name: what it is called in messages.

    Attributes:
        rank: number of the process that reads this part.
        world_size: of how many.
    """

    rank, world_size = 0, 1

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def everything(self) -> Iterable[Any]:
        """Return all documents, those of other processes too."""

    def documents(self, start: int = 0) -> Iterator[Any]:
        """Yield this process's documents, beginning with number `start` of them."""
        yield from islice(iter(self.everything()), self.rank + start * self.world_size, None, self.world_size)

    def shard(self, rank: int, world_size: int) -> Text:
        """Return documents `rank`, `rank + world_size`, ... of these."""
        require_rank(rank, world_size)
        part = copy.copy(self)
        part.rank, part.world_size = self.rank + self.world_size * rank, self.world_size * world_size
        return part

    def open(self, state: State | None = None) -> TextReader:
        """Return a reader of this process's documents.

        Args:
            state: from `TextReader.state_dict`, to go on from there.
        """
        return TextReader(self, state)


class TextReader:
    """Reads documents a few at a time, and knows how many it has read.

    A position is the number of documents and the digests of the latest of them, by which text that has changed in the
    meantime is recognised.

    Args:
        text: what to read.
        state: where to go on; documents before are skipped without being looked at.

    Raises:
        CheckpointError: if the text is not what it was.
    """

    def __init__(self, text: Text, state: State | None = None) -> None:
        self.text = text
        self.count = 0
        self._digests: list[str] = []
        self._documents = text.documents()
        if state is not None and state["documents"]:
            self._return(state)

    def take(self, most: int) -> list[str]:
        """Return the next documents, at most so many; none at the end.

        Raises:
            InputError: for a document that is no text.
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
        """Return how many documents were read, and the digests of the latest."""
        return {"documents": self.count, "latest": list(self._digests)}

    def _return(self, state: State) -> None:
        self._restart(state["documents"] - len(state["latest"]))
        self.take(len(state["latest"]))
        if self._digests != state["latest"]:
            raise CheckpointError(
                f"The text ({self.text.name}) has changed: its documents up to number {state['documents']} are not "
                "those that were read before the checkpoint. Resume with the text that the run was started with; one "
                "that is shuffled needs a seed."
            )

    def _restart(self, start: int) -> None:
        self.count, self._digests, self._documents = start, [], self.text.documents(start)


class IterableText(Text):
    """Documents from Python.

    Args:
        documents: strings that can be read again, such as a list; or a function that gives an iterable of them.
        name: what it is called in messages.
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
        split: what is one document: a ``"file"``, a ``"paragraph"`` (up to an empty line) or a ``"line"`` that is
            not empty. A file is in memory as a whole if it is one document.

    Raises:
        MissingFileError: if a file or folder is not there.
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
                raise MissingFileError(f"There is no {path}; expected a text file, or a folder of them.")
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
                    f"{path} cannot be read as text in UTF-8 ({error}): convert or leave it out."
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
            if line.strip():  # of empty ones, one process of several might read nothing else
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
        InputError: if it is no text.
    """
    if not isinstance(document, str):
        raise InputError(
            f"Document {number} of the text ({name}) is {shown(document)}; expected a string. Leave such documents "
            "out first, or name the column that holds the text."
        )
    try:
        encoded = document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"Document {number} of the text ({name}) is no valid Unicode ({error}): repair it, or leave it out."
        ) from error
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()
