"""Text from the optional `datasets` library: from the Hub, local files, and data sets in memory."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ...errors import InputError, MissingFileError, SAEError, did_you_mean, shown
from .base import State, require_rank
from .text import PACKED, IterableText, Text, TextFiles, TextReader, visible_files

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
}
"""Kinds of files, named like the builders of `datasets` except for tab-separated tables."""

_PACKED = (".gz", ".bz2", ".xz", ".zst")
FIRST_ROWS = 1000
"""Rows of a streaming data set that are searched for a value of every column."""
_STRINGS = ("string", "large_string")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DatasetText(Text):
    """One column of a `datasets.Dataset` or `datasets.IterableDataset`.

    With several processes, each reads the part that `datasets` assigns to it: whole shards if their number allows,
    otherwise every `world_size`-th row. Positions in a streaming data set are its own (`IterableDataset.state_dict`)
    if they prove exact; a shuffled one is read again up to its position.

    Args:
        dataset: one split.
        column: the column that holds the text; by default ``text``, otherwise the only column of strings.
        name: of the text in messages.

    Raises:
        InputError: if it is not a data set, or has no such column, or several of strings; while reading, if it cannot
            be read further.
    """

    def __init__(self, dataset: Any, *, column: str | None = None, name: str | None = None) -> None:
        datasets = require_datasets()
        if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            raise InputError(
                f"Given a {type(dataset).__name__} with the splits {', '.join(dataset)}; expected one of them, such "
                f"as dataset[{next(iter(dataset), 'train')!r}]."
            )
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise InputError(f"Given {shown(dataset)}; expected a datasets.Dataset or datasets.IterableDataset.")
        super().__init__(name or f"a {type(dataset).__name__}")
        self.streaming = isinstance(dataset, datasets.IterableDataset)
        self.column = _text_column(dataset, column, self.name)
        self.dataset = dataset.select_columns([self.column])

    def everything(self) -> Iterator[Any]:
        """Yield all documents of this process."""
        return self.rows(self.dataset)

    def documents(self, start: int = 0) -> Iterator[Any]:
        """Yield this process's documents, beginning with index `start` of them."""
        if self.streaming:
            return islice(self.rows(copy.deepcopy(self.dataset)), start, None)
        if start and self.dataset.data.column(self.column).null_count:  # rows with a null are not documents
            return islice(self.rows(self.dataset), start, None)
        end = len(self.dataset)
        return self.rows(self.dataset.select(range(start, end)) if start < end else ())

    def rows(self, dataset: Any) -> Iterator[Any]:
        """Yield the values of the column, without nulls.

        Raises:
            InputError: if `datasets` cannot read further.
        """
        for row in _rows(dataset, self.name):
            if row[self.column] is not None:
                yield row[self.column]

    def shard(self, rank: int, world_size: int) -> DatasetText:
        """Return one process's part."""
        require_rank(rank, world_size)
        part = copy.copy(self)
        part.rank, part.world_size = self.rank + self.world_size * rank, self.world_size * world_size
        if self.streaming:
            part.dataset = require_datasets().distributed.split_dataset_by_node(self.dataset, rank, world_size)
        else:
            part.dataset = self.dataset.shard(world_size, rank, contiguous=False, keep_in_memory=True)
        return part

    def open(self, state: State | None = None) -> TextReader:
        """Return a reader; for a streaming data set, one that saves the data set's own position."""
        return _StreamingReader(self, state) if self.streaming else TextReader(self, state)


class _StreamingReader(TextReader):
    """Resumes from the data set's own position before the latest documents, if that proves exact.

    The data set's position does not include the contents of its shuffle buffers. The latest documents are therefore
    read again, and the position is used only if they are the same; otherwise documents are counted from the beginning.
    """

    text: DatasetText
    _before: State | None = None

    def __init__(self, text: DatasetText, state: State | None = None) -> None:
        self._dataset = copy.deepcopy(text.dataset)  # a data set has one position for all its readers
        super().__init__(text, None)
        self._documents = text.rows(self._dataset)
        if state is None or not state["documents"]:
            return
        latest = state["latest"]
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
            self.count = state["documents"] - len(latest)
            self.take(len(latest))
            if self._digests == latest:
                return
        self._restore(state)

    def take(self, most: int) -> list[str]:
        """Return up to `most` of the next documents; none at the end."""
        before = self._dataset.state_dict()
        documents = super().take(most)
        if documents:
            self._before = before if _fits_into_json(before) else None
        return documents

    def state_dict(self) -> State:
        """Return the number of documents read, the digests of the latest, and the data set's position before them."""
        return {**super().state_dict(), "dataset": self._before}

    def _restart(self, start: int) -> None:
        self._dataset = copy.deepcopy(self.text.dataset)
        self.count, self._digests = start, []
        self._documents = islice(self.text.rows(self._dataset), start, None)


def open_text(
    source: Any,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    column: str | None = None,
    streaming: bool = True,
    documents: Literal["file", "paragraph", "line"] = "file",
) -> Text:
    """Open text from any supported source.

    Args:
        source: a data set's id on the Hub; a file or folder of ``.txt``, JSON (lines), Parquet, CSV or Arrow; a folder
            of ``Dataset.save_to_disk``; a `datasets.Dataset` or `IterableDataset`; an iterable of strings, or a
            function that returns one; or a `Text`.
        config: configuration of a data set on the Hub.
        split: split of a data set on the Hub or of a saved one.
        revision: branch, tag or commit of a data set on the Hub.
        column: column of a data set that holds the text; by default ``text``, otherwise the only column of strings.
        streaming: read a data set on the Hub or in files while it is downloaded or parsed, not all of it first.
        documents: unit of ``.txt`` files that is one document.

    Returns:
        The text.

    Raises:
        InputError: if it cannot be opened, or `datasets` is needed and not installed.
        MissingFileError: if a path does not exist.
    """
    if isinstance(source, Text):
        return source
    library = sys.modules.get("datasets")  # if it is not imported, `source` is not one of its data sets
    if library is not None and isinstance(
        source,
        (library.Dataset, library.IterableDataset, library.DatasetDict, library.IterableDatasetDict),
    ):
        return DatasetText(source, column=column)
    if not isinstance(source, (str, Path)):
        return IterableText(source)
    path = Path(source).expanduser() if len(str(source)) < 4096 and "\n" not in str(source) else None
    if path is not None and path.exists():
        return _open_path(path, split, column, streaming, documents)
    if isinstance(source, Path) or (path is not None and _looks_like_a_path(source)):
        raise MissingFileError(f"There is no {source}; expected a file or folder of text, or a data set's id.")
    if not _HUB_ID.fullmatch(source):
        raise InputError(
            f"Given the string {shown(source)} as text; expected a path or a data set's id on the Hub. Put the text "
            "itself into a list."
        )
    dataset = _loaded(source, source, name=config, split=split, revision=revision, streaming=streaming)
    return DatasetText(dataset, column=column, name=source)


def require_datasets() -> ModuleType:
    """Return the `datasets` library.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise InputError("Text from data sets needs the datasets library: pip install datasets.") from error
    return datasets


def _open_path(path: Path, split: str, column: str | None, streaming: bool, documents: Any) -> Text:
    """Open an existing file or folder."""
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = require_datasets().load_from_disk(str(path))
        if isinstance(saved, require_datasets().DatasetDict):
            if split not in saved:
                raise InputError(
                    f"{path} has no split {split!r}.{did_you_mean(split, saved)} It has: {', '.join(saved)}."
                )
            saved = saved[split]
        return DatasetText(saved, column=column, name=str(path))
    files = visible_files(path) if path.is_dir() else [path]
    kinds = {
        kind: [file for file in files if kind_of(file) == kind] for kind in {kind_of(file) for file in files} - {None}
    }
    if len(kinds) != 1:
        seen = ", ".join(sorted({file.suffix or file.name for file in files})[:10]) or "nothing"
        found = "files of several kinds" if kinds else "no files with a known suffix"
        raise InputError(
            f"{path} has {found}: {seen}. Expected one of .txt, {', '.join(BUILDERS)}; give other plain text as a "
            "list of files: TextFiles([paths]), or data.files in a configuration."
        )
    [(kind, chosen)] = kinds.items()
    if kind == "txt":
        return TextFiles(chosen, split=documents)
    return _open_tables(str(kind), chosen, str(path), column, streaming)


def open_files(
    files: Sequence[str | Path],
    *,
    column: str | None = None,
    streaming: bool = True,
    documents: Literal["file", "paragraph", "line"] = "file",
) -> Text:
    """Open a list of files: tables of one kind, or plain text with any suffix.

    Args:
        files: their paths.
        column: as for `open_text`.
        streaming: as for `open_text`.
        documents: as for `open_text`.

    Raises:
        InputError: if there are tables among plain text, or tables of several kinds; or as for `open_text`.
        MissingFileError: if a file does not exist.
    """
    paths = [Path(file) for file in files]
    tables = {path: kind for path in paths if (kind := kind_of(path)) in BUILDERS.values()}
    if not tables:
        return TextFiles(paths, split=documents)
    first, kind = next(iter(tables.items()))
    for path in paths:
        if kind_of(path) != kind:
            raise InputError(
                f"{path} is not of the same kind as {first}, whose rows are documents: give files of one kind, or "
                "convert them."
            )
        if not path.is_file():
            raise MissingFileError(f"There is no file {path}.")
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return _open_tables(str(kind), paths, f"{paths[0]}{more}", column, streaming)


def _open_tables(kind: str, files: Sequence[Path], name: str, column: str | None, streaming: bool) -> DatasetText:
    """Open tables, each row of which is a document."""
    builder, options = ("csv", {"sep": "\t"}) if kind == "tsv" else (kind, {})
    if all(not file.stat().st_size for file in files):
        raise InputError(f"The text ({name}) is empty: it has no rows.")
    names = [str(file) for file in files]
    dataset = _loaded(name, builder, data_files=names, split="train", streaming=streaming, **options)
    return DatasetText(dataset, column=column, name=name)


def _loaded(what: str, *args: Any, **options: Any) -> Any:
    try:
        return require_datasets().load_dataset(*args, **options)
    except SAEError:
        raise
    except Exception as error:  # the library, its file formats, the Hub's client and HTTP have their own error types
        raise InputError(
            f"The text {what!r} cannot be opened: {type(error).__name__}: {str(error).rstrip('.')}. Check the name, "
            "config, split and revision, or that the file's content matches its suffix."
        ) from error


def _rows(dataset: Any, name: str) -> Iterator[Any]:
    """Yield rows, converting errors of `datasets` to an `InputError`."""
    count, rows = 0, iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # each file format and file system has its own error types
            raise InputError(
                f"The text ({name}) cannot be read after document {count}: {type(error).__name__}: {error}."
            ) from error
        count += 1
        yield row


def kind_of(file: Path) -> str | None:
    """Return a file's kind by its suffix: one in `BUILDERS`, "txt" for plain text, or None."""
    suffix = file.suffix.lower()
    if suffix in _PACKED:
        inner = Path(file.stem).suffix.lower()
        return "txt" if inner == ".txt" and suffix in PACKED else BUILDERS.get(inner)
    return "txt" if suffix == ".txt" else BUILDERS.get(suffix)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or kind_of(Path(source)) is not None


def _text_column(dataset: Any, column: str | None, name: str) -> str:
    """Return the column that holds the text.

    Raises:
        InputError: listing the columns.
    """
    if dataset.features is None:  # a streaming data set without a schema: look at its first rows
        held = _first_values(dataset, name)
    else:
        held = {each: getattr(kind, "dtype", None) in _STRINGS for each, kind in dataset.features.items()}
    columns, texts = list(held), [each for each, is_text in held.items() if is_text]
    if column is None:
        if "text" not in texts and len(texts) != 1:
            found = "several columns of strings, and none named 'text'" if texts else "no column of strings"
            advice = "Give one as column; in a configuration, as data.text_column." if texts else "Give other text."
            raise InputError(f"The text ({name}) has {found}. Its columns: {', '.join(columns) or 'none'}. {advice}")
        return "text" if "text" in texts else texts[0]
    if column not in texts:
        why = "is not a column of strings" if column in columns else "is not a column"
        raise InputError(
            f"{column!r} {why} of the text ({name}).{did_you_mean(column, texts)} Its columns: {', '.join(columns)}."
        )
    return column


def _first_values(dataset: Any, name: str) -> dict[str, bool]:
    """Return, for each column of a streaming data set, whether its first value that is not null is a string.

    Raises:
        InputError: if it has no rows.
    """
    found: dict[str, Any] = {}
    for row in islice(_rows(copy.deepcopy(dataset), name), FIRST_ROWS):
        found |= {each: value for each, value in row.items() if found.get(each) is None}
        if all(value is not None for value in found.values()):
            break
    if not found:
        raise InputError(f"The text ({name}) is empty: it has no rows.")
    return {each: isinstance(value, str) for each, value in found.items()}


def _fits_into_json(state: Any) -> bool:
    try:
        return json.loads(json.dumps(state)) == state
    except (TypeError, ValueError):
        return False
