"""A stream that is interrupted at any batch resumes as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import CheckpointError
from hf_gated_sae.hooks.save_activations import save_activations
from hf_gated_sae.training import ActivationStream, ModelActivations, ShardActivations, TensorActivations, TextTokens
from hf_gated_sae.training.streams import TextFiles
from tests.support.tiny_models import tiny_model

from .positions import equal, first, through_files
from .words import documents, word_tokenizer

pytestmark = pytest.mark.slow

SITES = ["resid_post.0", "mlp_out.1"]
BATCH, BATCHES, AFTERWARDS = 8, 120, 12
DOCUMENTS = documents(90, longest=10)

Make = Callable[[], ActivationStream]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Make]:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    folder = tmp_path_factory.mktemp("activations")
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:03}.txt").write_text(document, encoding="utf-8")
    tokens = list(torch.randint(3, 97, (20, 2, 16), generator=torch.Generator().manual_seed(0)))
    save_activations(folder / "shards", model, SITES, tokens[:4], rows_per_shard=50)
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})

    def model_stream(text: Any, **packing: Any) -> ActivationStream:
        batches = TextTokens(text, tokenizer, context_length=16, sequences_per_batch=3, **packing)
        return ModelActivations(model, SITES, batches, buffer_size=100, seed=4)

    return {
        "tensors": lambda: TensorActivations({"a": torch.arange(103.0)[:, None], "b": -torch.arange(103.0)[:, None]}),
        "shards": lambda: ShardActivations(folder / "shards"),
        "part of shards": lambda: ShardActivations(folder / "shards", SITES[:1], seed=1).shard(1, 2),
        "tokens": lambda: ModelActivations(model, SITES, lambda: iter(tokens), buffer_size=100, dtype=torch.bfloat16),
        "packed": lambda: model_stream(DOCUMENTS),
        "padded": lambda: model_stream(DOCUMENTS, packing=False),
        "part of packed": lambda: model_stream(DOCUMENTS).shard(1, 3),
        "files": lambda: model_stream(TextFiles(folder)),
        "data set": lambda: model_stream(rows),
        "data stream": lambda: model_stream(rows.to_iterable_dataset(num_shards=4)),
        "part of a data stream": lambda: model_stream(rows.to_iterable_dataset(num_shards=4)).shard(1, 2),
        "shuffled data stream": lambda: model_stream(
            rows.to_iterable_dataset(num_shards=4).shuffle(3, buffer_size=20)
        ),
    }


KINDS = [
    *("tensors", "shards", "part of shards", "tokens", "packed", "padded", "part of packed", "files", "data set"),
    *("data stream", "part of a data stream", "shuffled data stream"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_resumes_exactly_from_any_batch(kinds, kind):
    make = kinds[kind]
    whole = first(make(), BATCH, BATCHES + AFTERWARDS)

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, BATCHES // 2), min_size=1, max_size=2))
    def interrupted(runs: list[int]) -> None:
        stream, done = make(), 0
        for count in runs:
            assert equal(first(stream, BATCH, count), whole[done : done + count])
            done += count
            state = through_files(stream.state_dict())
            stream = make()
            stream.load_state_dict(state)
        assert equal(first(stream, BATCH, AFTERWARDS), whole[done : done + AFTERWARDS])

    interrupted()


@pytest.mark.parametrize("kind", ["tensors", "packed", "data stream"])
def test_a_stream_resumes_from_every_batch_of_several_epochs(kinds, kind):
    stream = kinds[kind]()
    batches, states = [], []
    for batch, _ in zip(stream.batches(BATCH), range(100), strict=False):
        batches.append(batch)
        states.append(through_files(stream.state_dict()))
    epochs = {state["position"]["epoch"] for state in states}
    assert {0, 1} <= epochs
    other = kinds[kind]()
    for done, state in enumerate(states[:-1], start=1):
        other.load_state_dict(state)
        assert equal(first(other, BATCH, 1), batches[done : done + 1])


@pytest.mark.parametrize("kind", ["tensors", "shards", "packed", "data stream"])
def test_samples_and_saving_do_not_move_the_stream(kinds, kind):
    whole = first(kinds[kind](), BATCH, 30)
    stream = kinds[kind]()
    batches = stream.batches(BATCH)
    for expected in whole:
        assert equal([next(batches)], [expected])
        next(stream.sample(50))
        stream.state_dict()
    other = kinds[kind]()
    other.load_state_dict(stream.state_dict())
    assert equal(first(other, BATCH, 4), first(kinds[kind](), BATCH, 34)[30:])


def test_a_loaded_position_is_used_once_and_saved_unchanged_until_then(kinds):
    stream = kinds["packed"]()
    assert stream.state_dict()["position"] is None
    whole = first(stream, BATCH, 8)
    stream = kinds["packed"]()
    first(stream, BATCH, 3)
    state = stream.state_dict()
    stream.load_state_dict(state)
    again = kinds["packed"]()
    again.load_state_dict(through_files(stream.state_dict()))  # before anything was read
    assert equal(first(stream, BATCH, 5), whole[3:]) and equal(first(again, BATCH, 5), whole[3:])
    assert equal(first(stream, BATCH, 8), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_starts_over_unless_a_position_was_just_loaded(kinds, kind):
    stream = kinds[kind]()
    whole = first(stream, BATCH, 6)
    first(stream, BATCH, 3)
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert equal(first(stream, BATCH, 3), whole[3:])
    assert equal(first(stream, BATCH, 6), whole)
    stream.load_state_dict(state)
    stream.rewind()
    assert equal(first(stream, BATCH, 6), whole)


def test_a_streaming_data_set_resumes_from_its_own_position(monkeypatch):
    read: list[int] = []

    def rows():
        for number, document in enumerate(DOCUMENTS):
            read.append(number)
            yield {"text": document}

    tokenizer = word_tokenizer()

    def make(shuffled: bool) -> TextTokens:
        shards = datasets.IterableDataset.from_generator(
            lambda parts: (r for _ in parts for r in rows()), gen_kwargs={"parts": [0, 1, 2]}
        )
        return TextTokens(
            shards.shuffle(1, buffer_size=30) if shuffled else shards,
            tokenizer,
            context_length=16,
            sequences_per_batch=2,
        )

    for shuffled in (False, True):
        opened = make(shuffled).open()
        whole = list(opened)
        opened = make(shuffled).open()
        for _ in range(len(whole) - 2):
            next(opened)
        state = through_files(opened.state_dict())
        read.clear()
        assert torch.equal(next(make(shuffled).open(state))["input_ids"], whole[-2]["input_ids"])
        assert (len(read) > 2 * len(DOCUMENTS)) == shuffled  # all is read again only if its own position is not exact


def test_without_the_buffer_a_position_is_small_and_later_text_is_read():
    model, tokenizer, text = tiny_model("llama"), word_tokenizer(), documents(300)

    def make(save_buffer: bool) -> ModelActivations:
        tokens = TextTokens(text, tokenizer, context_length=16, sequences_per_batch=3)
        return ModelActivations(model, SITES[0], tokens, buffer_size=200, save_buffer=save_buffer)

    stream = make(False)
    first(stream, BATCH, 20)
    position = through_files(stream.state_dict())["position"]
    assert position["held"] == {} and position["rest"] == {} and position["tokens"]["sequences"] > 0
    resumed = make(False)
    resumed.load_state_dict(stream.state_dict())
    later = {tuple(row) for row in torch.cat([b[SITES[0]] for b in first(resumed, BATCH, 20)]).tolist()}
    read = [chunk[SITES[0]] for chunk in stream.read(stream.tokens.open())]
    done = position["tokens"]["sequences"] // 3
    assert later <= {tuple(row) for row in torch.cat(read[done:]).tolist()}


def test_a_position_of_another_stream_is_refused(kinds):
    state = kinds["packed"]().state_dict()
    with pytest.raises(CheckpointError, match="stream 'ModelActivations'; this one has 'TensorActivations'"):
        kinds["tensors"]().load_state_dict(state)
    tensors = TensorActivations(torch.zeros(50, 2))
    with pytest.raises(CheckpointError, match=r"rows 103; this one has 50"):
        tensors.load_state_dict({**kinds["tensors"]().state_dict(), "sites": [""]})
    with pytest.raises(CheckpointError, match="sites"):
        ShardActivations(kinds["shards"]().shards, SITES[1]).load_state_dict(kinds["shards"]().state_dict())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"buffer_size": 120}, "buffer_size 100; this one has 120"),
        ({"special_tokens": True}, "special_tokens False; this one has True"),
        ({"context_length": 8}, "context_length 16; this one has 8"),
        ({"packing": False, "eos": True}, "packing True; this one has False"),
        ({"bos": "document", "eos": True}, "bos 'sequence'; this one has 'document'"),
        ({"eos": False}, "eos True; this one has False"),
        ({"batches": list(torch.zeros(2, 2, 16).long())}, "tokens 'TextTokens'; this one has 'GivenTokens'"),
        ({"save_buffer": False}, None),
        ({"sequences_per_batch": 2}, None),
        ({"text": [*DOCUMENTS, "w3 w4"]}, None),
    ],
)
def test_a_position_fits_only_text_that_is_cut_and_shuffled_in_the_same_way(change, said):
    model, tokenizer = tiny_model("llama"), word_tokenizer()

    def make(
        text=DOCUMENTS, batches=None, buffer_size=100, special_tokens=False, save_buffer=True, **cutting
    ) -> ModelActivations:
        cutting = {"context_length": 16, "sequences_per_batch": 3, **cutting}
        tokens = TextTokens(text, tokenizer, **cutting) if batches is None else batches
        mixing = {"buffer_size": buffer_size, "special_tokens": special_tokens, "save_buffer": save_buffer}
        return ModelActivations(model, SITES, tokens, **mixing)

    stream = make()
    first(stream, BATCH, 2)
    state, other = through_files(stream.state_dict()), make(**change)
    if said is None:
        other.load_state_dict(state)
        assert first(other, BATCH, 2)
    else:
        with pytest.raises(CheckpointError, match=f"is of a stream with {said}"):
            other.load_state_dict(state)


@pytest.mark.parametrize("kind", ["tensors", "packed"])
def test_an_incomplete_position_is_refused(kinds, kind):
    stream = kinds[kind]()
    first(stream, BATCH, 3)
    state = stream.state_dict()
    for name in state["position"]:
        broken = {**state, "position": {key: value for key, value in state["position"].items() if key != name}}
        stream.load_state_dict(broken)
        with pytest.raises(CheckpointError, match="is incomplete"):
            stream.batches(BATCH)
    with pytest.raises(CheckpointError, match="no position"):
        stream.load_state_dict({key: value for key, value in state.items() if key != "position"})


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_has_changed_is_recognised(streaming):
    def make(texts: list[str]) -> TextTokens:
        rows = datasets.Dataset.from_dict({"text": texts})
        text = rows.to_iterable_dataset() if streaming else texts
        return TextTokens(text, word_tokenizer(), context_length=16, sequences_per_batch=2)

    opened = make(DOCUMENTS).open()
    next(opened)
    state = opened.state_dict()
    with pytest.raises(CheckpointError, match="has changed"):
        make(["w3", *DOCUMENTS]).open(state)
    with pytest.raises(CheckpointError, match="has changed"):
        make(DOCUMENTS[:5]).open(state)
