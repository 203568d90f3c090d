"""A harvest holds what `capture` gives of the tokens that count, each with its origin; off the disk, too."""

import json
import resource
import signal
import sys
import weakref

import datasets
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_gated_sae import ActivationShards, SAEModel, capture, harvest, save_activations
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError, ShapeError, SiteError, UnknownNameError
from tests.hooks.support import ARCHITECTURES, D_SAE, SITE, hooks_on, make_cross_layer, make_sae, model_of
from tests.support.tiny_models import HIDDEN, tiny_model

SITES = ["resid_post.0", "mlp_out.1"]


def padded_batches(count=3, rows=4, columns=7, side="left"):
    """Rows of several lengths, with BOS (1) in front, EOS (2) in some, and padding (0)."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        ids = torch.randint(3, 97, (rows, columns), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            missing = (row + number) % 4
            ids[row, missing if side == "left" else 0] = 1
            gap = slice(0, missing) if side == "left" else slice(columns - missing, columns)
            ids[row, gap], mask[row, gap] = 0, 0
        ids[0, 4] = 2
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def counted(batch):
    return (batch["attention_mask"] == 1) & (batch["input_ids"] != 1) & (batch["input_ids"] != 2)


def joined(harvests, key):
    return torch.cat([each[key] if isinstance(each[key], torch.Tensor) else each[key].dense() for each in harvests])


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_can_be_traced_back(side):
    model, sae, batches = model_of("llama"), make_sae(), padded_batches(side=side)
    harvests = list(harvest(model, [*SITES, sae], batches))
    documents = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    seen = 0
    for each in harvests:
        for number, (token, document, position) in enumerate(
            zip(each.token_ids.tolist(), each.documents.tolist(), each.positions.tolist(), strict=True)
        ):
            ids, mask = documents[document]
            real = ids[mask == 1]
            assert real[position] == token and token > 2
            alone = capture(model, SITES, input_ids=real[None])  # of the document by itself, without padding
            for site in SITES:
                assert torch.allclose(each[site][number], alone[site][0, position], atol=1e-5)
            seen += 1
    assert seen == sum(int(counted(batch).sum()) for batch in batches) == sum(map(len, harvests))


def test_values_are_those_of_capture():
    model, batches = model_of("llama"), padded_batches()
    saes = [make_sae(architecture) for architecture in ARCHITECTURES] + [make_cross_layer()]
    for batch, each in zip(batches, harvest(model, [*SITES, *saes], batches), strict=True):
        for key, value in capture(model, [*SITES, *saes], **batch).items():
            expected = value[counted(batch)]
            if key in SITES:
                assert torch.equal(each[key], expected)
            else:
                assert torch.allclose(each[key].dense(), expected, atol=1e-5)
                assert len(each[key].values) == (expected != 0).sum() < expected.numel()


def test_a_slice_of_an_sae_gives_its_latents_by_their_own_numbers(tmp_path):
    model, sae, batches = model_of("llama"), make_sae(), padded_batches(1)
    sae.save_pretrained(tmp_path)
    some = SAEModel.from_pretrained(tmp_path, latents=[5, 11, 58])
    [each] = harvest(model, [sae, some], batches)
    expected = each[sae].dense()
    assert expected[:, [5, 11, 58]].any()
    assert torch.allclose(each[some].dense()[:, [5, 11, 58]], expected[:, [5, 11, 58]], atol=1e-6)
    assert set(each[some].indices.tolist()) <= {5, 11, 58}


@pytest.mark.parametrize("side", ["left", "right"])
def test_latents_that_depend_on_other_tokens_are_those_of_each_document_by_itself(side):
    model, sae, [batch] = model_of("llama"), make_sae("temporal"), padded_batches(1, side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    ids[3], mask[3] = 0, 0  # a row of padding alone
    batch["attention_mask"] = mask
    [each] = harvest(model, [SITES[0], sae], [batch])
    dense, row = each[sae].dense(), 0
    for document in range(3):
        real = ids[document][mask[document] == 1]
        alone = capture(model, sae, input_ids=real[None])[sae][0]
        for position in (real > 2).nonzero().flatten().tolist():
            assert (each.documents[row], each.positions[row]) == (document, position)
            assert torch.allclose(dense[row], alone[position], atol=2e-6) and alone[position].any()
            row += 1
    assert row == len(each)
    assert torch.equal(capture(model, sae, **batch)[sae][counted(batch)], dense)


def test_autocast_reaches_no_latents():
    model, saes, [batch] = model_of("llama"), [make_sae("temporal"), make_sae()], padded_batches(1)
    with torch.autocast("cpu", torch.bfloat16):
        [each] = harvest(model, saes, [batch["input_ids"]])
        x = capture(model, "resid_post.1", input_ids=batch["input_ids"])["resid_post.1"]
    for sae in saes:
        expected = sae.encode(x)[counted({**batch, "attention_mask": batch["input_ids"] != 0})]
        assert torch.allclose(each[sae].dense(), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("settings", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_left_out(settings):
    config = settings(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, sae, [batch] = peft.get_peft_model(tiny_model("llama"), config).eval(), make_sae(), padded_batches(1)
    expected = capture(model, ["resid_post.1", sae], **batch)
    [each] = harvest(model, ["resid_post.1", sae], [batch])
    assert torch.equal(each["resid_post.1"], expected["resid_post.1"][:, -7:][counted(batch)])
    assert torch.allclose(each[sae].dense(), expected[sae][:, -7:][counted(batch)], atol=1e-6)
    assert not torch.allclose(each["resid_post.1"], next(harvest(tiny_model("llama"), SITE, [batch]))[SITE])


def test_what_has_no_vector_for_each_token_is_refused():
    rotations = "model.rotary_emb.output"
    for what in (rotations, make_sae(site=rotations, d_in=8)):
        with pytest.raises(ShapeError, match=r"\[1, 7, 8\].*4 rows of 7 tokens"):
            next(harvest(model_of("llama"), what, padded_batches(1)))


def test_special_tokens_can_be_kept_but_never_padding():
    batches = padded_batches()
    kept = list(harvest(model_of("llama"), SITES, batches, special_tokens=True))
    assert sum(map(len, kept)) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert any((each.token_ids == 1).any() for each in kept) and all((each.token_ids != 0).all() for each in kept)


def test_a_batch_may_have_no_token_that_counts():
    empty = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    [nothing, something] = harvest(model_of("llama"), [SITES[0], make_sae()], [empty, torch.tensor([5, 6, 7])])
    assert len(nothing) == 0 and nothing[SITES[0]].shape == (0, HIDDEN)
    assert something.documents.tolist() == [2, 2, 2] and something.positions.tolist() == [0, 1, 2]


def test_only_one_batch_is_held():
    released = []

    def batches():
        for _ in range(4):
            yield padded_batches(1)[0]

    stream, previous = harvest(model_of("llama"), [*SITES, make_sae()], batches), None
    for each in stream:
        released.append(previous is None or previous() is None)
        previous = weakref.ref(each[SITES[0]])
        del each
    assert released == [True] * 4


def test_the_model_runs_in_evaluation_mode_and_gets_its_modes_back():
    model, batches = tiny_model("gpt2", resid_pdrop=0.5), padded_batches(2)
    expected = [each[SITES[0]] for each in harvest(model, SITES, batches)]
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    for each, value in zip(harvest(model, SITES, batches), expected, strict=True):
        assert torch.equal(each[SITES[0]], value)
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ShapeError):
        next(harvest(model, SITES, [torch.zeros(1, 1, 1, dtype=torch.long)]))
    with pytest.raises(IndexError):
        next(harvest(model, SITES, [torch.tensor([[500]])]))
    assert [module.training for module in model.modules()] == modes
    assert hooks_on(model) == ({}, [])


def test_dtype():
    sae = make_sae()
    [each] = harvest(model_of("llama"), [SITES[0], sae], padded_batches(1), dtype=torch.float16)
    assert each[SITES[0]].dtype == each[sae].values.dtype == torch.float16
    with pytest.raises(InputError, match="floating"):
        harvest(model_of("llama"), SITES, [], dtype=torch.int8)


def test_harvests_of_inference_mode_are_ordinary_tensors():
    sae = make_sae()
    with torch.inference_mode():
        [each] = harvest(model_of("llama"), [SITES[0], sae], padded_batches(1))
    assert not each[SITES[0]].is_inference() and not each[sae].values.is_inference()


@pytest.mark.parametrize(
    ("what", "batches", "error", "message"),
    [
        ([], [], InputError, "nothing"),
        ("resid_pots.1", [], SiteError, "resid_post"),
        ("resid_post.9", [], SiteError, r"resid_post\.9"),
        (make_sae(d_in=16), [], ShapeError, "16"),
    ],
)
def test_what_cannot_be_harvested_is_refused_before_the_first_batch(what, batches, error, message):
    with pytest.raises(error, match=message):
        harvest(model_of("llama"), what, batches)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4)}, ShapeError, r"\[2, 4\]"),
        ({"ids": torch.ones(2, 5)}, InputError, "input_ids"),
        ("text", InputError, "input_ids"),
        (torch.rand(2, 5), ShapeError, "float32"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_run_is_an_error(batch, error, message):
    with pytest.raises(error, match=message):
        list(harvest(model_of("llama"), SITES, [batch]))


def test_one_batch_in_place_of_several_is_an_error():
    with pytest.raises(InputError, match="expected batches"):
        list(harvest(model_of("llama"), SITES, padded_batches()[0]))


def test_what_was_not_harvested():
    [each] = harvest(model_of("llama"), SITES, padded_batches(1))
    with pytest.raises(UnknownNameError, match=r"mlp_out\.1"):
        each["mlp_out.0"]


# ---------------------------------------------------------------------------------------------------- on disk


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


def test_what_was_written_is_read(shards, expected):
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


def test_the_folder_says_what_it_is(shards):
    folder, index = shards[0].folder, json.loads((shards[0].folder / "index.json").read_text())
    count = len(index["shards"])
    assert count > 3 and [shard["rows"] for shard in index["shards"][:-1]] == [13] * (count - 1)
    files = [f"activations-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "index.json"])
    assert index["values"]["resid_post.0"] == {"kind": "activations", "width": HIDDEN, "dtype": "float32"}
    latents = index["values"]["latents.resid_post.1#2"]
    assert latents["width"] == D_SAE and latents["sites"] == ["resid_post.1"] and latents["architecture"] == "topk"
    assert index["model_type"] == "llama" and index["special_tokens"] is False
    assert set(index["versions"]) == {"hf-gated-sae", "torch", "transformers"}
    tensors = load_file(folder / files[0])  # nothing of ours is needed to read it
    assert tensors["resid_post.0"].shape == (13, HIDDEN) and tensors["latents.resid_post.1.offsets"].shape == (14,)
    assert len(tensors["latents.resid_post.1.values"]) < 13 * D_SAE


def test_the_source_of_the_text_is_noted(tmp_path):
    model, folder = tiny_model("gpt2"), tmp_path / "model"
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)

    class Tokenizer:
        name_or_path = "acme/words"

    index = save_activations(tmp_path / "x", again, SITES, padded_batches(1), tokenizer=Tokenizer()).index
    assert index["base_model"] == str(folder) and index["tokenizer"] == "acme/words"


def test_values_are_mapped_not_read(tmp_path):
    """What is changed in the file shows, and only there."""
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
def test_a_harvest_that_does_not_come_to_its_end_leaves_nothing(tmp_path, batches, error):
    with pytest.raises(error):
        save_activations(tmp_path / "x", model_of("llama"), SITES, batches, rows_per_shard=5)
    assert contents(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """Stood in for by the limit that the system puts on the size of a file."""
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


def test_what_is_there_is_never_written_over(tmp_path):
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
        ("index.json", _cut, CheckpointError, "no JSON"),
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


def test_a_dataset_holds_the_same(shards, expected, tmp_path, monkeypatch):
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


def test_a_dataset_needs_its_library(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install datasets"):
        shards[0].to_dataset()
