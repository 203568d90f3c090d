"""The corpus must be the same text, split the same way, wherever the demo runs."""

import hashlib
import subprocess
import sys

import pytest

from hf_gated_sae.demo import corpus
from hf_gated_sae.errors import InputError, UnknownNameError


def test_files_are_sorted_readable_sources_of_the_library():
    files = corpus.source_files()
    assert list(files) == sorted(files)
    assert {"json/decoder.py", "argparse.py", "asyncio/locks.py"} <= set(files)
    assert all(path.endswith(".py") and (corpus.standard_library() / path).is_file() for path in files)
    assert all(isinstance(corpus.read(path), str) for path in files)


@pytest.mark.parametrize(
    "unwanted", ["test/", "tests/", "site-packages/", "dist-packages/", "idlelib/", "lib2to3/", "encodings/"]
)
def test_unwanted_folders_are_left_out(unwanted):
    assert not [path for path in corpus.source_files() if f"/{unwanted}" in f"/{path}"]


def test_files_that_name_the_building_machine_are_left_out():
    assert not [path for path in corpus.source_files() if "sysconfigdata" in path or path.startswith("config-")]


def test_the_two_splits_share_nothing_and_make_up_the_corpus():
    training, held_out = set(corpus.training_files()), set(corpus.held_out_files())
    assert not training & held_out
    assert training | held_out == set(corpus.source_files())
    assert 0.05 < len(held_out) / len(corpus.source_files()) < 0.15


def test_a_file_is_held_out_by_its_name_alone():
    # These hold on every Python, with or without the files: the shipped model was trained on this split.
    assert corpus.is_held_out("_pydecimal.py") and corpus.is_held_out("asyncio/locks.py")
    assert not corpus.is_held_out("json/decoder.py") and not corpus.is_held_out("argparse.py")
    first_bytes = hashlib.sha256(b"argparse.py").digest()[:8]
    assert corpus.is_held_out("argparse.py") == (int.from_bytes(first_bytes, "big") % 10 == 0)


def test_another_process_sees_the_same_corpus():
    code = "from hf_gated_sae.demo import corpus; import sys; sys.stdout.write(corpus.corpus_digest())"
    environment_seed = ["-c", f"import os; os.environ['PYTHONHASHSEED'] = '7'; {code}"]
    result = subprocess.run([sys.executable, *environment_seed], capture_output=True, text=True, check=True)
    assert result.stdout == corpus.corpus_digest()


def test_texts_are_the_files_of_the_split():
    assert sorted(corpus.texts("held_out")) == sorted(filter(None, map(corpus.read, corpus.held_out_files())))


@pytest.mark.parametrize("limit", [0, 1, 1_000, 100_000])
def test_a_size_limit_gives_a_prefix_that_ends_with_a_whole_line(limit):
    limited, everything = "".join(corpus.texts("training", limit)), "".join(corpus.texts("training", limit + 500_000))
    assert len(limited.encode()) <= limit
    assert everything.startswith(limited)
    assert not limited or limited.endswith("\n")
    if limit >= 100_000:
        assert len(limited.encode()) > 0.9 * limit


def test_the_digest_tells_splits_apart():
    digests = {corpus.corpus_digest(), corpus.corpus_digest("training"), corpus.corpus_digest("held_out")}
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_mistakes_are_explained():
    with pytest.raises(UnknownNameError, match="Did you mean 'held_out'"):
        corpus.files_of("heldout")
    with pytest.raises(InputError, match="max_bytes is -1"):
        list(corpus.texts("training", -1))


def test_a_python_without_source_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus.standard_library.cache_clear()
    try:
        with pytest.raises(InputError, match="regular installation"):
            corpus.standard_library()
    finally:
        corpus.standard_library.cache_clear()
