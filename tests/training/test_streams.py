from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError, ShapeError
from hf_gated_sae.hooks import capture
from hf_gated_sae.training import ModelActivations, TensorActivations, collect, harvest
from hf_gated_sae.training.shuffle import ShuffleBuffer
from tests.support.tiny_models import tiny_model

SITES = ["resid_post.0", "resid_post.1"]


def numbered(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32).unsqueeze(1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 40),
    batch=st.integers(1, 20),
    chunks=st.lists(st.integers(0, 30), max_size=8),
    seed=st.integers(0, 9),
)
def test_the_shuffle_buffer_loses_and_repeats_nothing(size, batch, chunks, seed):
    batch = min(batch, size)
    buffer = ShuffleBuffer(size, torch.Generator().manual_seed(seed))
    served, first = [], 0
    for count in chunks:
        rest = buffer.add(numbered(first, count))
        first += count
        while buffer.is_full:
            served += buffer.serve(batch, keep=(size - batch) // 2)
            rest = buffer.add(rest)
            assert buffer.count <= size
        assert len(rest) == 0
    served += buffer.serve(batch)
    values = torch.cat(served).flatten().tolist() if served else []
    assert all(len(one) == batch for one in served)
    assert len(set(values)) == len(values)
    assert set(values) <= set(range(first)) and first - len(values) == buffer.count < batch


def test_the_shuffle_buffer_mixes_what_came_in_order():
    buffer = ShuffleBuffer(1000, torch.Generator().manual_seed(0))
    buffer.add(numbered(0, 1000))
    batch = next(buffer.serve(100)).flatten()
    assert 300 < batch.mean() < 700 and (batch.diff() < 0).any()


def test_tensor_activations_visit_everything_once_per_epoch_in_new_orders():
    stream = TensorActivations(numbered(0, 103), seed=1)
    batches = [batch.flatten() for batch in islice(stream.batches(10), 20)]
    for epoch in (batches[:10], batches[10:]):
        assert len(set(torch.cat(epoch).tolist())) == 100
    assert not torch.equal(torch.cat(batches[:10]), torch.cat(batches[10:]))
    assert torch.equal(torch.stack(batches), torch.stack([b.flatten() for b in islice(stream.batches(10), 20)]))


def test_tensor_activations_refuse_what_they_cannot_serve():
    with pytest.raises(InputError, match="less than one batch of 64"):
        next(TensorActivations(torch.randn(10, 4)).batches(64))
    with pytest.raises(ShapeError, match=r"\[2, 3, 4\]"):
        TensorActivations(torch.randn(2, 3, 4))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")  # bos 1, eos 2, pad 0


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (6, 12), generator=generator)
    ids[:, 0] = 1
    ids[2, 5] = 2
    attention = torch.ones_like(ids)
    attention[4, 8:] = 0
    ids[4, 8:] = 50  # padding is known by the mask, not by the id
    return [{"input_ids": i, "attention_mask": a} for i, a in zip(ids.split(2), attention.split(2), strict=True)]


def test_harvest_gives_what_capture_gives_without_special_tokens(model, batches):
    for batch, harvested in zip(batches, harvest(model, SITES, batches), strict=True):
        keep = (batch["attention_mask"] == 1) & (batch["input_ids"] > 2)
        for site in SITES:
            assert torch.equal(harvested[site], capture(model, site, **batch)[site][keep])


def test_harvest_can_keep_special_tokens_but_never_padding(model, batches):
    counts = [len(harvested["resid_post.0"]) for harvested in harvest(model, SITES[:1], batches, special_tokens=True)]
    assert counts == [24, 24, 24 - 4]


def test_collect_reads_several_sites_of_the_same_tokens(model, batches):
    seen = []
    collected = collect(model, SITES, batches, dtype=torch.float16, progress=seen.append)
    expected = 6 * 11 - 1 - 4
    assert {site: tuple(x.shape) for site, x in collected.items()} == dict.fromkeys(SITES, (expected, 32))
    assert all(x.dtype == torch.float16 for x in collected.values())
    assert seen[-1] == expected
    for site in SITES:
        pieces = [harvested[site] for harvested in harvest(model, SITES, batches)]
        assert torch.equal(collected[site], torch.cat(pieces).half())


def test_model_activations_are_the_harvested_ones_shuffled_and_endless(model, batches):
    everything = collect(model, ["resid_post.1"], batches)["resid_post.1"]
    stream = ModelActivations(model, "resid_post.1", batches, buffer_size=32, seed=3)
    served = torch.cat(list(islice(stream.batches(8), 60)))
    known = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in served.tolist()} == known
    assert len(served) > 5 * len(everything)
    assert not torch.equal(served[: len(everything)], everything)
    again = torch.cat(list(islice(stream.batches(8), 60)))
    assert torch.equal(served, again)


def test_a_sample_is_of_the_wanted_size(model, batches):
    stream = ModelActivations(model, "resid_post.1", lambda: iter(batches), buffer_size=32)
    assert sum(map(len, stream.sample(30))) == 30
    assert sum(map(len, stream.sample(10_000))) == 61
    assert sum(map(len, TensorActivations(torch.randn(9000, 2)).sample(5000))) == 5000


def test_an_exhausted_generator_is_explained(model, batches):
    stream = ModelActivations(model, "resid_post.1", iter(batches), buffer_size=32).batches(8)
    with pytest.raises(InputError, match="read once"):
        list(islice(stream, 20))


def test_a_buffer_too_small_to_shuffle_is_refused(model, batches):
    with pytest.raises(InputError, match="at least two batches, 16"):
        next(ModelActivations(model, "resid_post.1", batches, buffer_size=15).batches(8))


@pytest.mark.parametrize(
    ("batch", "error"), [({"labels": torch.ones(1, 2)}, InputError), (torch.ones(2, 3), ShapeError)]
)
def test_a_batch_without_token_ids_is_refused(model, batch, error):
    with pytest.raises(error):
        next(iter(harvest(model, SITES, [batch])))
