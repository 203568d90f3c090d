"""Activation shards are read back as they were written, or refused; no half-written files are left."""

import json
import resource
import signal
import sys

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_gated_sae import ActivationShards, harvest, save_activations
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, ShapeError, UnknownNameError
from tests.hooks.support import (
    D_SAE,
    counted,
    joined,
    make_sae,
    model_of,
    padded_batches,
)
from tests.support.tiny_models import HIDDEN, tiny_model

SITES = ["resid_post.0", "mlp_out.1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "of" / "text"
    saes = [make_sae(), make_sae("topk", seed=3)]
    return save_activations(folder, model_of("llama"), [*SITES, *saes], padded_batches(), rows_per_shard=13), saes


@pytest.fixture(scope="module")
def expected(shards):
    _, saes = shards
    harvests = list(harvest(model_of("llama"), [*SITES, *saes], padded_batches()))
    names = dict(zip([*SITES, *saes], [*SITES, "latents.resid_post.1", "latents.resid_post.1#2"], strict=True))
    values = {name: joined(harvests, key) for key, name in names.items()}
    tokens = {
        name: torch.cat([getattr(each, name) for each in harvests]) for name in ("token_ids", "documents", "positions")
    }
    return values, tokens


def check(found, rows, expected, names=None):
    values, tokens = expected
    assert list(found.values) == list(values if names is None else names)
    for name, value in found.values.items():
        assert torch.equal(value if isinstance(value, torch.Tensor) else value.dense(), values[name][rows])
    for name, value in tokens.items():
        assert torch.equal(getattr(found, name), value[rows])


def test_shards_are_read_back_as_written(shards, expected):
    written, _ = shards
    read = ActivationShards(written.folder)
    assert len(read) == len(expected[1]["token_ids"]) == read.index["rows"]
    check(read.rows(slice(None)), slice(None), expected)
    batches = list(read.batches(10, names=[SITES[1], "latents.resid_post.1"]))
    assert [len(batch) for batch in batches] == [min(10, len(read) - at) for at in range(0, len(read), 10)]
    for number, batch in enumerate(batches):
        rows = torch.arange(len(read))[number * 10 : number * 10 + 10]
        check(batch, rows, expected, [SITES[1], "latents.resid_post.1"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows_in_any_order(shards, expected, data):
    rows = data.draw(st.lists(st.integers(0, len(shards[0]) - 1), max_size=30))
    check(shards[0].rows(rows), torch.tensor(rows, dtype=torch.long), expected)


def test_a_seed_shuffles_over_all_shards_and_loses_nothing(shards):
    read = shards[0]
    places = lambda seed: torch.cat(  # noqa: E731
        [batch.documents * 1000 + batch.positions for batch in read.batches(9, names=[SITES[0]], seed=seed)]
    )
    in_order = places(None)
    assert torch.equal(places(1), places(1)) and not torch.equal(places(1), places(2))
    assert torch.equal(places(1).sort().values, in_order.sort().values) and len(in_order.unique()) == len(read)


def test_the_index_describes_the_folder(shards):
    folder, index = shards[0].folder, json.loads((shards[0].folder / "index.json").read_text())
    count = len(index["shards"])
    assert count > 3 and [shard["rows"] for shard in index["shards"][:-1]] == [13] * (count - 1)
    files = [f"activations-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "index.json"])
    assert index["values"]["resid_post.0"] == {"kind": "activations", "width": HIDDEN, "dtype": "float32"}
    latents = index["values"]["latents.resid_post.1#2"]
    assert latents["width"] == D_SAE and latents["sites"] == ["resid_post.1"] and latents["architecture"] == "topk"
    assert index["model_type"] == "llama" and index["special_tokens"] is False
    assert index["special_token_ids"] == [0, 1, 2] and index["norm_limit"] is None
    assert set(index["versions"]) == {"hf-gated-sae", "torch", "transformers"}
    tensors = load_file(folder / files[0])  # readable without this package
    assert tensors["resid_post.0"].shape == (13, HIDDEN) and tensors["latents.resid_post.1.offsets"].shape == (14,)
    assert len(tensors["latents.resid_post.1.values"]) < 13 * D_SAE


def test_model_and_tokenizer_are_recorded(tmp_path):
    model, folder = tiny_model("gpt2"), tmp_path / "model"
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)

    class Tokenizer:
        name_or_path = "acme/words"

    index = save_activations(tmp_path / "x", again, SITES, padded_batches(1), tokenizer=Tokenizer()).index
    assert index["base_model"] == str(folder) and index["tokenizer"] == "acme/words"


def test_values_are_mapped_not_read(tmp_path):
    """A later change of the file shows in the rows that it changes."""
    read = save_activations(tmp_path / "x", model_of("llama"), SITES, padded_batches(), dtype=torch.bfloat16)
    first, sixth = read.rows([0])[SITES[0]], read.rows([5])[SITES[0]]
    assert first.dtype == torch.bfloat16
    with next(read.folder.glob("*.safetensors")).open("r+b") as file:
        file.seek(file.read().index(sixth.view(torch.uint8).numpy().tobytes()))
        file.write(b"\0" * sixth.nbytes)
    assert not read.rows([5])[SITES[0]].any() and torch.equal(read.rows([0])[SITES[0]], first)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def interrupted(batches):
    yield from batches
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], InputError),
        ([torch.ones(2, 3, dtype=torch.long)], InputError),
        ([*padded_batches(), {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}], ShapeError),
        (interrupted(padded_batches()), KeyboardInterrupt),
    ],
)
def test_an_unfinished_harvest_leaves_no_files(tmp_path, batches, error):
    with pytest.raises(error):
        save_activations(tmp_path / "x", model_of("llama"), SITES, batches, rows_per_shard=5)
    assert contents(tmp_path) == []


def test_a_full_disk_leaves_no_files(tmp_path):
    """Simulated by the system's limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written, and nothing was"):
            save_activations(tmp_path / "x", model_of("llama"), SITES, padded_batches())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path) == []


def test_existing_files_are_never_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    save_activations(tmp_path / "empty", model_of("llama"), SITES, padded_batches(1))
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("empty", "file"):
        with pytest.raises(InputError, match="exists already"):
            save_activations(tmp_path / name, model_of("llama"), SITES, padded_batches(1))
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_activations(tmp_path / "file" / "x", model_of("llama"), SITES, padded_batches(1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_progress_and_settings(tmp_path):
    seen = []
    save_activations(tmp_path / "x", model_of("llama"), SITES, padded_batches, progress=seen.append)
    assert seen == torch.tensor([int(counted(batch).sum()) for batch in padded_batches()]).cumsum(0).tolist()
    with pytest.raises(InputError, match="rows_per_shard"):
        save_activations(tmp_path / "y", model_of("llama"), SITES, padded_batches, rows_per_shard=0)
    with pytest.raises(InputError, match="named twice"):
        save_activations(tmp_path / "y", model_of("llama"), ["resid_post.0", make_site()], padded_batches)


def make_site():
    from hf_gated_sae import Site

    return Site.parse("resid_post.0")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("file", "damage", "error", "message"),
    [
        ("index.json", lambda path: path.unlink(), MissingFileError, "index.json"),
        ("index.json", _cut, CheckpointError, "not JSON"),
        ("index.json", lambda path: path.write_text('{"format": "other"}'), CheckpointError, "format"),
        ("activations-00000-of-00001.safetensors", lambda path: path.unlink(), MissingFileError, "00000-of-00001"),
        ("activations-00000-of-00001.safetensors", _cut, CheckpointError, "cannot be read"),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"width": 32', '"width": 31')),
         CheckpointError, "index beside it"),
    ],
)  # fmt: skip
def test_damage_is_an_error(tmp_path, file, damage, error, message):
    save_activations(tmp_path / "x", model_of("llama"), SITES, padded_batches(1))
    damage(tmp_path / "x" / file)
    with pytest.raises(error, match=message):
        ActivationShards(tmp_path / "x").rows([0])


def test_rows_and_names_that_do_not_exist(shards):
    for wanted in ([-1], [len(shards[0])]):
        with pytest.raises(InputError, match="rows"):
            shards[0].rows(wanted)
    with pytest.raises(UnknownNameError, match=r"resid_post\.0"):
        shards[0].rows([0], ["resid_pots.0"])
    with pytest.raises(InputError, match="batch_size"):
        next(shards[0].batches(0))
    assert len(shards[0].rows([])) == 0


def test_to_dataset_gives_the_same_values(shards, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = shards[0].to_dataset()
    values, tokens = expected
    assert len(dataset) == len(shards[0])
    for name, value in tokens.items():
        assert dataset[name][:] == value.tolist()
    for site in SITES:
        assert torch.equal(torch.tensor(dataset[site][:]), values[site])
        assert dataset.features[site].length == HIDDEN
    for row, latents in enumerate(dataset["latents.resid_post.1"]):
        dense = values["latents.resid_post.1"][row]
        assert latents["indices"] == dense.nonzero().flatten().tolist()
        assert torch.equal(torch.tensor(latents["values"]), dense[dense != 0])


def test_to_dataset_needs_the_datasets_library(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install datasets"):
        shards[0].to_dataset()
