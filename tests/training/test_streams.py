from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError, MissingFileError, ShapeError, SiteError, UnknownNameError
from hf_gated_sae.hooks import capture
from hf_gated_sae.hooks.save_activations import save_activations
from hf_gated_sae.training import ModelActivations, ShardActivations, TensorActivations, collect, harvest
from hf_gated_sae.training.processes import Processes
from hf_gated_sae.training.sharding import GatheredActivations
from tests.support.tiny_models import tiny_model

SITES = ["resid_post.0", "resid_post.1"]


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32).unsqueeze(1)


def test_tensor_activations_visit_everything_once_per_epoch_in_new_orders():
    stream = TensorActivations(numbered(103), seed=1)
    assert stream.sites == ("",)
    batches = [batch[""].flatten() for batch in islice(stream.batches(10), 20)]
    for epoch in (batches[:10], batches[10:]):
        assert len(set(torch.cat(epoch).tolist())) == 100
    assert not torch.equal(torch.cat(batches[:10]), torch.cat(batches[10:]))
    assert torch.equal(torch.stack(batches), torch.stack([b[""].flatten() for b in islice(stream.batches(10), 20)]))


def test_rows_of_several_sites_stay_together():
    stream = TensorActivations({"mlp_in.0": numbered(50), "mlp_out.0": -numbered(50).expand(-1, 3)})
    assert stream.sites == ("mlp_in.0", "mlp_out.0")
    for batch in [*islice(stream.batches(7), 20), *stream.sample(30)]:
        assert torch.equal(batch["mlp_out.0"], -batch["mlp_in.0"].expand(-1, 3))


def test_tensor_activations_refuse_what_they_cannot_serve():
    with pytest.raises(InputError, match="less than one batch of 64"):
        next(TensorActivations(torch.randn(10, 4)).batches(64))
    with pytest.raises(InputError, match=r"less than one batch of 6 \(12 in 2 processes\)"):
        TensorActivations(torch.randn(10, 4)).shard(0, 2).batches(6)
    with pytest.raises(InputError, match="batch_size is 0"):
        TensorActivations(torch.randn(10, 4)).batches(0)
    with pytest.raises(ShapeError, match=r"\[2, 3, 4\]"):
        TensorActivations(torch.randn(2, 3, 4))
    with pytest.raises(ShapeError, match="10 at a, 11 at b"):
        TensorActivations({"a": torch.randn(10, 4), "b": torch.randn(11, 4)})
    with pytest.raises(ShapeError, match="int64 at a"):
        TensorActivations({"a": torch.ones(10, 4).long()})
    with pytest.raises(InputError, match="no activations"):
        TensorActivations({})


@pytest.mark.parametrize("kind", ["tensors", "shards"])
@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 6), done=st.integers(0, 20))
def test_processes_share_the_batches_of_one_process(written, kind, world_size, batch_size, done):
    def make() -> TensorActivations | ShardActivations:
        return TensorActivations(numbered(61), seed=2) if kind == "tensors" else ShardActivations(written, seed=2)

    one = [next(iter(b.values())) for b in islice(make().batches(world_size * batch_size), done + 5)]
    for rank in range(world_size):
        part = make().shard(rank, world_size)
        mine = [next(iter(b.values())) for b in islice(part.batches(batch_size), done)]
        resumed = make().shard(rank, world_size)
        resumed.load_state_dict(part.state_dict() if done else resumed.state_dict())
        mine += [next(iter(b.values())) for b in islice(resumed.batches(batch_size), 5)]
        assert all(torch.equal(a, b[rank::world_size]) for a, b in zip(mine, one, strict=True))


def test_a_position_is_the_same_in_every_process_and_fits_another_number_of_processes():
    whole = [b[""] for b in islice(TensorActivations(numbered(61)).batches(6), 8)]
    parts = [TensorActivations(numbered(61)).shard(rank, 2) for rank in range(2)]
    states = []
    for part in parts:
        list(islice(part.batches(3), 3))
        states.append(part.state_dict())
    assert torch.equal(states[0]["position"].pop("generator"), states[1]["position"]["generator"])
    del states[1]["position"]["generator"]
    assert states[0] == states[1]
    three = TensorActivations(numbered(61)).shard(2, 3)
    list(islice(parts[0].batches(3), 3))
    three.load_state_dict(parts[0].state_dict())
    assert torch.equal(next(three.batches(2))[""], whole[3][2::3])


def test_a_rank_out_of_range_is_refused(model, batches):
    for stream in (TensorActivations(torch.zeros(5, 2)), ModelActivations(model, "resid_post.1", batches)):
        with pytest.raises(InputError, match="rank is 2 of world_size 2"):
            stream.shard(2, 2)


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
    ids[4, 8:] = 50  # padding is recognised by the mask, not by the id
    return [{"input_ids": i, "attention_mask": a} for i, a in zip(ids.split(2), attention.split(2), strict=True)]


@pytest.fixture
def written(model, batches, tmp_path):
    return save_activations(tmp_path / "shards", model, SITES, batches, rows_per_shard=17)


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
    served = torch.cat([batch["resid_post.1"] for batch in islice(stream.batches(8), 60)])
    known = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in served.tolist()} == known
    assert len(served) > 5 * len(everything)
    assert not torch.equal(served[: len(everything)], everything)
    again = torch.cat([batch["resid_post.1"] for batch in islice(stream.batches(8), 60)])
    assert torch.equal(served, again)


def test_several_sites_come_from_one_forward_and_their_rows_are_of_the_same_tokens(model, batches):
    everything = collect(model, SITES, batches)
    pairs = {tuple(a): b for a, b in zip(everything[SITES[0]].tolist(), everything[SITES[1]].tolist(), strict=True)}
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = ModelActivations(model, SITES, batches, buffer_size=32)
    try:
        served = list(islice(stream.batches(8), 30))
    finally:
        hook.remove()
    assert stream.sites == tuple(SITES) and list(served[0]) == SITES
    for batch in served:
        assert [pairs[tuple(row)] for row in batch[SITES[0]].tolist()] == batch[SITES[1]].tolist()
    assert len(calls) <= 30 * 8 / 61 * 3 + 4


def test_processes_read_different_batches_of_tokens(model, batches):
    parts = [ModelActivations(model, SITES[0], batches, buffer_size=32).shard(rank, 2) for rank in range(2)]
    rows = [{tuple(r) for b in islice(part.batches(4), 30) for r in b[SITES[0]].tolist()} for part in parts]
    for rank in range(2):
        assert rows[rank] == {tuple(row) for row in collect(model, SITES, batches[rank::2])[SITES[0]].tolist()}
    assert rows[0] != rows[1]


def test_a_sample_has_the_requested_size(model, batches):
    def size(stream, count):
        return sum(len(x) for piece in stream.sample(count) for x in piece.values())

    stream = ModelActivations(model, "resid_post.1", lambda: iter(batches), buffer_size=32)
    assert size(stream, 30) == 30
    assert size(stream, 10_000) == 61
    assert size(TensorActivations(torch.randn(9000, 2)), 5000) == 5000


def test_activations_have_the_requested_dtype_and_the_size_of_the_buffer_is_known(model, batches):
    stream = ModelActivations(model, SITES, batches, buffer_size=1000, dtype=torch.bfloat16)
    batch = next(stream.batches(8))
    assert {x.dtype for x in batch.values()} == {torch.bfloat16}
    assert stream.buffer_bytes == 1000 * 2 * 32 * 2
    assert ModelActivations(model, SITES[0], batches, buffer_size=1000).buffer_bytes == 1000 * 32 * 4
    assert GatheredActivations(stream, Processes(), Processes()).buffer_bytes == stream.buffer_bytes
    assert TensorActivations(torch.zeros(9, 4)).buffer_bytes == 0


def test_a_model_in_bfloat16_is_read_as_it_is(batches):
    model = tiny_model("llama").to(torch.bfloat16)
    assert (
        next(ModelActivations(model, SITES[0], batches, buffer_size=32).batches(8))[SITES[0]].dtype == torch.bfloat16
    )


def test_an_exhausted_generator_is_explained(model, batches):
    stream = ModelActivations(model, "resid_post.1", iter(batches), buffer_size=32).batches(8)
    with pytest.raises(InputError, match="read once"):
        list(islice(stream, 20))


def test_a_buffer_too_small_to_shuffle_is_refused(model, batches):
    with pytest.raises(InputError, match="at least two batches, 16"):
        next(ModelActivations(model, "resid_post.1", batches, buffer_size=15).batches(8))


def test_invalid_sites_dtypes_and_tokens_are_refused(model, batches):
    for sites in ([], ["resid_post.1", "resid_post.1"], ["resid_post.1", "model.layers.1.output", "resid_post.1"]):
        with pytest.raises(InputError, match="each of them once"):
            ModelActivations(model, sites, batches)
    with pytest.raises(InputError, match="int8"):
        ModelActivations(model, SITES, batches, dtype=torch.int8)
    with pytest.raises(InputError, match="one dict as tokens"):
        ModelActivations(model, SITES, batches[0])
    with pytest.raises(SiteError, match="resid_post.9"):
        next(ModelActivations(model, "resid_post.9", batches, buffer_size=32).batches(8))


def test_tokens_that_the_model_does_not_know_are_refused(model):
    tokens = [torch.tensor([[3, 4, 97]])]
    with pytest.raises(InputError, match="id 97, and the model's vocabulary has 97 tokens"):
        collect(model, SITES, tokens)


def test_activations_that_are_not_finite_name_the_site_and_the_token(batches):
    model = tiny_model("llama")
    collect(model, ["resid_pre.0", "resid_post.1"], batches)  # prove the sites while all values are finite
    model.get_input_embeddings().weight.data[50] = float("nan")
    clean = [batch for batch in batches if not (batch["input_ids"] == 50).any()]
    odd = clean[0]["input_ids"].clone()
    odd[1, 7] = 50
    tokens = [clean[0], odd, clean[0]]
    stream = ModelActivations(model, ["resid_pre.0", "resid_post.1"], tokens, buffer_size=64)
    with pytest.raises(
        InputError, match=r"1 of \d+ activations at resid_pre.0 are NaN .* position 7 of sequence 3, in batch 1"
    ):
        list(islice(stream.batches(8), 20))
    with pytest.raises(InputError, match="float32: run it in bfloat16"):
        list(stream.sample(1000))


def test_activations_that_a_dtype_cannot_hold_are_refused(model, batches):
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data *= 1e6
    with pytest.raises(InputError, match=r"The model's values in torch.float32 overflow torch.float16"):
        collect(model, ["resid_pre.0"], batches, dtype=torch.float16)


def test_the_activations_for_an_sae_are_found_by_its_site(model, batches):
    stream = ModelActivations(model, SITES, batches)
    assert stream.key("resid_post.1") == "resid_post.1"
    with pytest.raises(UnknownNameError, match="Did you mean 'resid_post.1'"):
        stream.key("resid_post.2")
    with pytest.raises(UnknownNameError):
        stream.key(None)
    assert ModelActivations(model, SITES[0], batches).key(None) == SITES[0]
    assert TensorActivations(torch.zeros(4, 2)).key("resid_post.7") == ""


def test_shards_give_what_was_written(written, model, batches):
    stream = ShardActivations(written, dtype=torch.float64)
    everything = collect(model, SITES, batches)
    assert stream.sites == tuple(SITES) and len(stream) == 61
    epoch = list(islice(stream.batches(10), 6))
    for site in SITES:
        rows = Counter(tuple(row) for batch in epoch for row in batch[site].tolist())
        assert rows.total() == 60 and rows <= Counter(map(tuple, everything[site].double().tolist()))
    pairs = {tuple(a): b for a, b in zip(*(everything[site].double().tolist() for site in SITES), strict=True)}
    assert all(pairs[tuple(a)] == b for e in epoch for a, b in zip(*(e[s].tolist() for s in SITES), strict=True))


def test_shards_that_cannot_be_read_are_refused(written, model, batches, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'resid_post.1'"):
        ShardActivations(written, ["resid_post.2"])
    with pytest.raises(InputError, match="no sites"):
        ShardActivations(written, [])
    with pytest.raises(MissingFileError):
        ShardActivations(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("batch", "error"), [({"labels": torch.ones(1, 2)}, InputError), (torch.ones(2, 3), ShapeError)]
)
def test_a_batch_without_token_ids_is_refused(model, batch, error):
    with pytest.raises(error):
        next(iter(harvest(model, SITES, [batch])))
    with pytest.raises(error):
        collect(model, SITES, [batch])
