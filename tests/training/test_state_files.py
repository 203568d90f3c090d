"""Nested states are written and read back exactly; values that would need a pickle are refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import CheckpointError, InputError
from hf_gated_sae.training.randomness import random_state, restore_random_state
from hf_gated_sae.training.state_files import read_state, write_state

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors
states = st.dictionaries(
    st.text(),
    st.recursive(leaves, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3)),
    max_size=4,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states)
def test_what_is_written_is_read(tmp_path, state):
    for file in tmp_path.iterdir():
        file.unlink()
    write_state(tmp_path, "state", state)
    assert same(read_state(tmp_path, "state"), state)


def test_tensors_that_share_memory_are_written_separately(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    state = {"whole": whole, "part": whole[1], "turned": whole.T, "again": [whole, whole]}
    write_state(tmp_path, "state", state)
    assert same(read_state(tmp_path, "state"), state)


def test_a_value_that_would_need_a_pickle_is_refused_with_its_path(tmp_path):
    with pytest.raises(InputError, match="has a set at saes/3"):
        write_state(tmp_path, "state", {"saes": [1, 2, 3, {4}]})
    with pytest.raises(InputError, match="has the key 7 at optimizer"):
        write_state(tmp_path, "state", {"optimizer": {7: 1}})
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_are_named(tmp_path):
    write_state(tmp_path, "state", {"x": torch.ones(3)})
    (tmp_path / "state.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"state\.json and state\.safetensors cannot be read"):
        read_state(tmp_path, "state")
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(tmp_path, "state")
    with pytest.raises(CheckpointError, match=r"other\.json"):
        read_state(tmp_path, "other")


def test_random_generators_resume_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    kept = random_state(torch.device("cpu"))
    try:
        draw()  # an odd number of normal values leaves one over, which is part of the state
        write_state(tmp_path, "random", random_state(torch.device("cpu")))
        expected = [draw() for _ in range(3)]
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        restore_random_state(read_state(tmp_path, "random"), torch.device("cpu"))
        assert [draw() for _ in range(3)] == expected
    finally:
        restore_random_state(kept, torch.device("cpu"))
