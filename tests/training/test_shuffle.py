from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.training.shuffle import ShuffleBuffer


def numbered(first: int, count: int) -> dict[str, torch.Tensor]:
    x = torch.arange(first, first + count, dtype=torch.float32).unsqueeze(1)
    return {"a": x, "b": torch.cat([-x, x + 0.5], 1)}


def aligned(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = rows["a"], rows["b"]
    assert torch.equal(b, torch.cat([-a, a + 0.5], 1))
    return a.flatten()


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
            served += map(aligned, buffer.serve(batch, keep=(size - batch) // 2))
            rest = buffer.add(rest)
            assert buffer.count <= size
        assert len(aligned(rest)) == 0
    served += map(aligned, buffer.serve(batch))
    values = torch.cat(served).tolist() if served else []
    assert all(len(one) == batch for one in served)
    assert len(set(values)) == len(values)
    assert set(values) <= set(range(first)) and first - len(values) == buffer.count < batch


def test_the_shuffle_buffer_mixes_what_came_in_order():
    buffer = ShuffleBuffer(1000, torch.Generator().manual_seed(0))
    buffer.add(numbered(0, 1000))
    batch = aligned(next(buffer.serve(100)))
    assert 300 < batch.mean() < 700 and (batch.diff() < 0).any()


@settings(max_examples=40, deadline=None)
@given(filled=st.integers(0, 30), taken=st.integers(0, 3), more=st.integers(0, 20), mixed=st.booleans())
def test_a_loaded_buffer_serves_what_the_saved_one_would(filled, taken, more, mixed):
    buffer = ShuffleBuffer(30, torch.Generator().manual_seed(1))
    buffer.add(numbered(0, filled))
    if mixed:
        buffer.mix()
    for _ in range(min(taken, filled // 5)):
        buffer.take(5)
    other = ShuffleBuffer(30, torch.Generator())
    other.generator.set_state(buffer.generator.get_state())
    other.add(numbered(100, 7))  # loading discards these rows
    other.load_state_dict(buffer.state_dict())
    assert other.count == buffer.count
    served = []
    for each in (buffer, other):
        each.add(numbered(30, more))
        served.append([aligned(rows) for rows in each.serve(4)])
    assert len(served[0]) == len(served[1]) and all(map(torch.equal, *served))


def test_saving_a_buffer_changes_nothing_and_copies():
    buffer = ShuffleBuffer(10, torch.Generator().manual_seed(1))
    buffer.add(numbered(0, 6))
    state = buffer.state_dict()
    kept = state["a"].clone()
    buffer.add(numbered(50, 4))
    buffer.take(10)
    buffer.add(numbered(70, 10))
    assert torch.equal(state["a"], kept) and torch.equal(kept.flatten(), torch.arange(6.0))
