from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys

import datasets
import pytest

from hf_gated_sae.errors import InputError, MissingFileError, UnknownNameError
from hf_gated_sae.training import open_text
from hf_gated_sae.training.streams import DatasetText, IterableText, TextFiles
from hf_gated_sae.training.streams.dataset import open_files

TEXTS = ["one", "two three", "", "four\n\nfive", "sechs zäh"]


def rows(**more: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, **more})


def write(folder, kind: str) -> object:
    """Write the texts in one form, and return what `open_text` is given."""
    if kind == "saved":
        datasets.DatasetDict({"train": rows()}).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "txt folder":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        (folder / "notes.md").write_text("not a document", encoding="utf-8")
        (folder / ".hidden.txt").write_text("not a document", encoding="utf-8")
        return str(folder)
    path = folder / f"texts.{kind}"
    if kind == "parquet":
        rows().to_parquet(path)
    elif kind in ("csv", "tsv"):
        rows().to_csv(path, sep="," if kind == "csv" else "\t")
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif kind == "jsonl.gz":
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "tsv", "txt folder", "saved"])
@pytest.mark.parametrize("streaming", [True, False])
def test_text_is_read_from_files(tmp_path, monkeypatch, kind, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    text = open_text(write(folder, kind), streaming=streaming)
    expected = [each for each in TEXTS if each or kind not in ("csv", "tsv")]  # csv reads an empty string as null
    assert list(text.documents()) == expected
    assert list(text.documents(3)) == expected[3:] and list(text.documents(99)) == []


@pytest.mark.parametrize("streaming", [True, False])
def test_a_null_is_not_a_document(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = [None, "a", None, None, "b", "c", None, "d"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": each, "id": 1}) + "\n" for each in given), encoding="utf-8")
    text = open_text(path, streaming=streaming)
    for start in range(5):
        assert list(text.documents(start)) == ["a", "b", "c", "d"][start:]
    reader = text.open()
    assert reader.take(2) == ["a", "b"]
    assert text.open(reader.state_dict()).take(5) == ["c", "d"]
    parts = [list(text.shard(rank, 2).documents()) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_plain_text_may_be_compressed(tmp_path, ending):
    packed = {"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress("über\n\nzwei".encode())
    (tmp_path / f"a.txt.{ending}").write_bytes(packed)
    assert list(open_text(tmp_path / f"a.txt.{ending}", documents="line").documents()) == ["über", "zwei"]
    assert list(open_text(tmp_path).documents()) == ["über\n\nzwei"]
    (tmp_path / f"a.txt.{ending}").write_bytes(packed[:-6])
    with pytest.raises(InputError, match="cannot be read as text in UTF-8"):
        list(open_text(tmp_path).documents())


def test_tables_of_different_separators_are_not_mixed(tmp_path):
    (tmp_path / "a.csv").write_text("text\nonly")
    (tmp_path / "b.tsv").write_text("text\tnumber\nfirst, second\t1")
    assert list(open_files([tmp_path / "b.tsv"]).documents()) == ["first, second"]
    with pytest.raises(InputError, match="b.tsv is not of the same kind as .*a.csv"):
        open_files([tmp_path / "a.csv", tmp_path / "b.tsv"])
    with pytest.raises(InputError, match="files of several kinds"):
        open_text(tmp_path)


def test_a_table_without_rows_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="a.jsonl\\) is empty: it has no rows"):
        open_text(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "source",
    [TEXTS, tuple(TEXTS), lambda: iter(TEXTS), rows(), rows(number=[1, 2, 3, 4, 5]), rows().to_iterable_dataset(2)],
    ids=["list", "tuple", "function", "Dataset", "two columns", "IterableDataset"],
)
def test_text_in_memory_can_be_read_repeatedly(source):
    text = open_text(source)
    for start in (0, 2, 0):
        assert list(text.documents(start)) == TEXTS[start:]
    reader = text.open()
    assert [reader.take(3), reader.take(3), reader.take(3)] == [TEXTS[:3], TEXTS[3:], []]


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}) + "\n")
    assert list(open_text(tmp_path).documents()) == ["text 0", "text 1", "text 2"]


def test_a_file_is_one_document_or_one_per_paragraph_or_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a\nb\n\n  \nc\n\nd", encoding="utf-8")
    assert list(open_text(path).documents()) == ["a\nb\n\n  \nc\n\nd"]
    assert list(open_text(path, documents="paragraph").documents()) == ["a\nb\n", "c\n", "d"]
    lines = open_text(path, documents="line")
    assert list(lines.documents()) == ["a", "b", "c", "d"]
    assert [list(lines.shard(rank, 2).documents()) for rank in (0, 1)] == [["a", "c"], ["b", "d"]]
    assert list(TextFiles([path, path], split="paragraph").documents(4)) == ["c\n", "d"]
    with pytest.raises(UnknownNameError, match="Did you mean 'paragraph'"):
        open_text(path, documents="paragraphs")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["list", "Dataset", "shards", "examples", "files"])
def test_processes_read_different_documents(tmp_path, kind, world_size):
    texts = [f"text {number:02}" for number in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    data = datasets.Dataset.from_dict({"text": texts})
    sources = {"list": texts, "Dataset": data, "files": tmp_path}
    sources |= {"shards": data.to_iterable_dataset(6), "examples": data.to_iterable_dataset(1)}
    whole = open_text(sources[kind])
    parts = [whole.shard(rank, world_size) for rank in range(world_size)]
    read = [list(part.documents()) for part in parts]
    assert sorted(sum(read, [])) == texts and all(len(each) == 12 // world_size for each in read)
    if kind != "shards":
        assert read == [texts[rank::world_size] for rank in range(world_size)]
    if kind in ("list", "files", "Dataset"):
        assert list(parts[1].shard(1, 2).documents(1)) == texts[1::world_size][1::2][1:]
    assert list(parts[1].documents(2)) == read[1][2:]


def test_the_column_of_text_is_found_or_must_be_given():
    data = datasets.Dataset.from_dict({"id": [1], "content": ["a"], "title": ["b"], "text": ["c"]})
    assert list(open_text(data).documents()) == ["c"]
    assert list(open_text(data, column="title").documents()) == ["b"]
    assert list(open_text(data.remove_columns(["text", "title"])).documents()) == ["a"]
    with pytest.raises(
        InputError,
        match="several columns of strings, .* Its columns: id, content, title. Give one .* data.text_column",
    ):
        open_text(data.remove_columns("text"))
    with pytest.raises(InputError, match="no column of strings. Its columns: id. Give other text."):
        open_text(data.select_columns("id"))
    with pytest.raises(
        InputError, match="'contnet' is not a column .* Did you mean 'content'. Its columns: id, content"
    ):
        open_text(data, column="contnet")
    with pytest.raises(InputError, match="'id' is not a column of strings"):
        open_text(data, column="id")


def test_the_columns_of_a_stream_without_features_are_those_of_its_first_row():
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"body": "a", "n": 1}, {"body": "b", "n": 2}]))
    assert stream.features is None
    assert list(open_text(stream).documents()) == ["a", "b"]
    late = datasets.IterableDataset.from_generator(lambda: iter([{"body": None, "n": 1}, {"body": "b", "n": 2}]))
    assert list(open_text(late).documents()) == ["b"]
    with pytest.raises(InputError, match="Did you mean 'body'"):
        open_text(stream, column="bdoy")
    with pytest.raises(InputError, match="has no rows"):
        open_text(datasets.IterableDataset.from_generator(lambda: iter([])))


def test_a_string_that_is_neither_a_path_nor_an_id_is_explained(tmp_path):
    with pytest.raises(InputError, match="Put the text itself into a list"):
        open_text("The ferry left at nine.")
    with pytest.raises(InputError, match="Put the text itself into a list"):
        open_text("x" * 10_000 + "\n")
    for gone in ("./gone", str(tmp_path / "gone"), "gone.jsonl", tmp_path / "gone"):
        with pytest.raises(MissingFileError, match="There is no"):
            open_text(gone)
    with pytest.raises(InputError, match="expected an iterable of strings"):
        open_text(3)
    with pytest.raises(InputError, match="put a single text into a list"):
        IterableText("text")


def test_folders_that_hold_no_text_or_several_kinds_are_explained(tmp_path):
    with pytest.raises(InputError, match="no files with a known suffix: nothing"):
        open_text(tmp_path)
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(InputError, match=r"known suffix: .md. Expected one of .txt, .json.* data.files"):
        open_text(tmp_path)
    assert list(TextFiles([tmp_path / "a.md"]).documents()) == ["a"]
    with pytest.raises(InputError, match="no .txt files"):
        TextFiles(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="files of several kinds: .jsonl, .md, .txt"):
        open_text(tmp_path)
    with pytest.raises(MissingFileError, match="gone.txt"):
        TextFiles([tmp_path / "gone.txt"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("zäh".encode("latin-1"))
    with pytest.raises(InputError, match="latin.txt cannot be read as text in UTF-8"):
        open_text(latin).open().take(1)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(InputError, match="broken.jsonl"):
        open_text(broken).open().take(5)


def test_documents_that_are_not_text_are_named():
    for documents, number in ((["a", None], 1), ([{"text": "a"}], 0), (["a", "b", b"c"], 2)):
        with pytest.raises(InputError, match=f"Document {number} of the text .* expected a string"):
            open_text(documents).open().take(5)
    with pytest.raises(InputError, match="Document 1 of the text .* not valid Unicode"):
        open_text(["a", "\ud800"]).open().take(5)


def test_a_split_must_be_chosen(tmp_path):
    splits = datasets.DatasetDict({"train": rows(), "test": rows()})
    with pytest.raises(
        InputError, match=r"with the splits train, test; expected one of them, such as dataset\['train'\]"
    ):
        open_text(splits)
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="no split 'trian'. Did you mean 'train'"):
        open_text(tmp_path / "saved", split="trian")
    with pytest.raises(InputError, match="expected a datasets.Dataset"):
        DatasetText(TEXTS)


def test_a_data_set_that_is_not_there_is_explained(monkeypatch):
    def absent(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/nothing' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(InputError, match="'me/nothing' cannot be opened: .* doesn't exist .* Check the name, config"):
        open_text("me/nothing")


def test_the_options_of_a_data_set_on_the_hub_are_passed_on(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = open_text("me/texts", config="en", split="validation", revision="abc", streaming=False)
    assert list(text.documents()) == TEXTS and text.name == "me/texts"
    options = {"name": "en", "split": "validation", "revision": "abc", "streaming": False}
    assert asked == [(("me/texts",), options)]


def test_without_the_datasets_library_only_other_text_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text("a")
    assert list(open_text(tmp_path).documents()) == ["a"] and list(open_text(TEXTS).documents()) == TEXTS
    (tmp_path / "a.jsonl").write_text("{}")
    for source in ("me/texts", tmp_path / "a.jsonl"):
        with pytest.raises(InputError, match="pip install datasets"):
            open_text(source)


def test_a_reader_can_be_resumed_after_any_take(tmp_path):
    texts = [f"text {number}" for number in range(20)]
    data = datasets.Dataset.from_dict({"text": texts})
    for source in (texts, data, data.to_iterable_dataset(3), data.to_iterable_dataset(3).shuffle(1, buffer_size=5)):
        whole = open_text(source).open().take(100)
        assert sorted(whole) == sorted(texts)
        for done in range(0, 24, 3):
            reader = open_text(source).open()
            for _ in range(done // 3):
                reader.take(3)
            resumed = open_text(source).open(json.loads(json.dumps(reader.state_dict())))
            assert resumed.take(100) == whole[done:]
