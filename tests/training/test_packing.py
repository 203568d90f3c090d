from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.hooks import capture
from hf_gated_sae.training import ModelActivations, TextTokens, collect, harvest
from tests.support.tiny_models import tiny_model

from .words import BOS, EOS, PAD, documents, word_tokenizer

TOKENIZER = word_tokenizer()
THREE = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]


def ids(tokens: TextTokens) -> list[list[int]]:
    return [row for batch in tokens for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (None, None, [[1, 3, 4, 5, 2], [1, 6, 2, 7, 8]]),
        ("sequence", False, [[1, 3, 4, 5, 6], [1, 7, 8, 9, 10]]),
        ("document", None, [[1, 3, 4, 5, 1], [6, 1, 7, 8, 9]]),
        ("document", True, [[1, 3, 4, 5, 2], [1, 6, 2, 1, 7]]),
        ("none", True, [[3, 4, 5, 2, 6], [2, 7, 8, 9, 10]]),
        ("none", False, [[3, 4, 5, 6, 7]]),
    ],
)
def test_documents_follow_each_other_in_full_sequences(bos, eos, expected):
    assert ids(TextTokens(THREE, TOKENIZER, context_length=5, bos=bos, eos=eos)) == expected


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (None, None, [[1, 3, 4, 5], [1, 6], [1, 7, 8, 9]]),
        ("document", True, [[1, 3, 4, 2], [1, 6, 2], [1, 7, 8, 2]]),
        ("none", False, [[3, 4, 5], [6], [7, 8, 9, 10]]),
    ],
)
def test_documents_that_are_not_packed_are_one_sequence_each(bos, eos, expected):
    tokens = TextTokens(THREE, TOKENIZER, context_length=4, packing=False, bos=bos, eos=eos, sequences_per_batch=3)
    [batch] = tokens
    assert [
        row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ] == expected
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) <= {PAD}


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(3, 96), max_size=12), min_size=1, max_size=9),
    length=st.integers(2, 9),
    per_batch=st.integers(1, 4),
    bos=st.sampled_from(["document", "sequence", "none"]),
    eos=st.booleans(),
)
def test_packing_loses_only_the_remainder_and_repeats_nothing(texts, length, per_batch, bos, eos):
    flow = []
    for text in filter(None, texts):
        flow += [BOS] * (bos == "document") + text + [EOS] * eos
    body = length - (bos == "sequence")
    tokens = TextTokens(
        [" ".join(f"w{n}" for n in text) for text in texts],
        TOKENIZER,
        context_length=length,
        sequences_per_batch=per_batch,
        bos=bos,
        eos=eos,
    )
    if len(flow) < body:
        with pytest.raises(InputError, match=f"{len(texts)} documents with {sum(map(len, texts))} tokens"):
            list(tokens)
        return
    batches = [batch["input_ids"] for batch in tokens]
    assert all(len(batch) == per_batch for batch in batches[:-1]) and 0 < len(batches[-1]) <= per_batch
    rows = torch.cat(batches)
    if bos == "sequence":
        assert (rows[:, 0] == BOS).all()
        rows = rows[:, 1:]
    assert rows.flatten().tolist() == flow[: len(flow) // body * body]


def test_tokens_can_be_read_repeatedly_and_harvested():
    tokens = TextTokens(documents(30), TOKENIZER, context_length=8)
    assert ids(tokens) == ids(tokens) != []
    found = [each.token_ids for each in harvest(tiny_model("llama"), "resid_post.0", tokens)]
    assert torch.cat(found).tolist() == [token for row in ids(tokens) for token in row if token > 2]


@pytest.mark.parametrize("packing", [True, False])
def test_activations_leave_special_tokens_out(packing):
    model = tiny_model("llama")
    tokens = TextTokens(documents(20), TOKENIZER, context_length=8, packing=packing, bos="document", eos=True)
    expected = []
    for batch in tokens:
        keep = batch["input_ids"] > 2
        expected.append(capture(model, "resid_post.1", **batch)["resid_post.1"][keep])
    assert torch.equal(collect(model, ["resid_post.1"], tokens)["resid_post.1"], torch.cat(expected))


def test_separators_are_left_out_even_if_the_model_does_not_call_them_special():
    model, text = tiny_model("llama"), documents(20)
    other = word_tokenizer(eos_token="w50", bos_token="w51")
    tokens = TextTokens([t.replace("w50", "w3").replace("w51", "w3") for t in text], other, context_length=8)
    count = sum((batch["input_ids"] < 50).sum() + (batch["input_ids"] > 51).sum() for batch in tokens)
    assert len(collect(model, ["resid_post.0"], tokens)["resid_post.0"]) == count
    everything = collect(model, ["resid_post.0"], tokens, special_tokens=True)["resid_post.0"]
    assert len(everything) == sum(batch["input_ids"].numel() for batch in tokens) > count


def test_special_tokens_of_the_tokenizer_are_left_out_except_unknown_words():
    tokenizer = word_tokenizer(unk_token="w3", extra_special_tokens=["w70", "w71"])
    tokens = TextTokens(["w3 w70 w4 w5", "w6 w71 w7 w8"], tokenizer, context_length=5, bos="none")
    assert tokens.special_ids == (PAD, BOS, EOS, 70, 71)
    [found] = harvest(tiny_model("llama"), "resid_post.0", tokens)
    expected = torch.stack([x for x, token in zip(found["resid_post.0"], found.token_ids, strict=True) if token < 70])
    assert found.token_ids.tolist() == [3, 70, 4, 5, 6, 71, 7, 8]
    assert torch.equal(collect(tiny_model("llama"), ["resid_post.0"], tokens)["resid_post.0"], expected)
    assert TextTokens(THREE, word_tokenizer(unk_token="<eos>")).special_ids == (PAD, BOS, EOS)  # as in GPT-2


def test_processes_read_different_documents():
    texts = [f"w{n} w{n} w{n}" for n in range(3, 15)]
    tokens = TextTokens(texts, TOKENIZER, context_length=4, bos="none")
    parts = [tokens.shard(rank, 3) for rank in range(3)]
    assert [ids(part) for part in parts] == [[[n, n, n, EOS] for n in range(3 + rank, 15, 3)] for rank in range(3)]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([], "is empty: it has no documents"),
        (["", "  "], "is empty: it has 2 documents with 0 tokens"),
        (
            ["w3 w4", "w5"],
            "is too short: it has 2 documents with 3 tokens, less than one sequence of context_length 16",
        ),
    ],
)
def test_text_that_is_empty_or_too_short_is_explained(texts, found):
    stream = ModelActivations(
        tiny_model("llama"), "resid_post.0", TextTokens(texts, TOKENIZER, context_length=16), buffer_size=64
    )
    for read in (lambda: next(stream.batches(8)), lambda: next(stream.sample(8))):
        with pytest.raises(InputError, match=found):
            read()
    with pytest.raises(InputError, match="the part of process 1 of 2"):
        list(TextTokens(["w3 " * 30], TOKENIZER, context_length=16).shard(1, 2))


@pytest.mark.parametrize(
    ("special", "options", "error"),
    [
        ({"bos_token": None}, {"bos": "sequence"}, "has no BOS token, .* pass bos='none'"),
        ({"eos_token": None}, {"eos": True}, "has no EOS token, .* pass eos=False"),
        ({}, {"context_length": 1}, "context_length is 1; expected more than the 1 special"),
        ({}, {"context_length": 2, "packing": False, "eos": True}, "more than the 2 special"),
        ({}, {"sequences_per_batch": 0}, "sequences_per_batch is 0"),
    ],
)
def test_missing_special_tokens_and_short_sequences_are_explained(special, options, error):
    with pytest.raises(InputError, match=error):
        TextTokens(THREE, word_tokenizer(**special), **options)


def test_an_unknown_bos_policy_is_explained():
    wrong: Any = "documents"
    with pytest.raises(UnknownNameError, match="Did you mean 'document'"):
        TextTokens(THREE, TOKENIZER, bos=wrong)


def test_a_tokenizer_without_special_tokens_packs_text_alone():
    bare = word_tokenizer(bos_token=None, eos_token=None, pad_token=None)
    assert ids(TextTokens(THREE, bare, context_length=4)) == [[3, 4, 5, 6], [7, 8, 9, 10]]
    [batch] = TextTokens(THREE, bare, context_length=4, packing=False)
    assert batch["attention_mask"].sum() == 8


def test_sequences_longer_than_the_model_reads_are_refused():
    with pytest.raises(InputError, match="context_length is 257, and the model reads at most 256"):
        ModelActivations(tiny_model("llama"), "resid_post.0", TextTokens(THREE, TOKENIZER, context_length=257))
