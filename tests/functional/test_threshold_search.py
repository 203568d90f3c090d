"""The search finds all values that reach a level, and no others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_gated_sae.functional.cpu.threshold_search import ThresholdSearch
from hf_gated_sae.functional.indices import true_indices

shares = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
whole = st.sampled_from([torch.int16, torch.bfloat16, torch.float32, torch.float64])


def numbers(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1000).to(dtype)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), shares, st.integers(0, 1), st.integers(0, 99))
def test_true_indices(shape: list[int], share: float, offset: int, seed: int) -> None:
    mask = (torch.rand([*shape, 8], generator=torch.Generator().manual_seed(seed)) < share)[offset * (shape[0] > 1) :]
    assert torch.equal(true_indices(mask), mask.reshape(-1).nonzero().squeeze(1))
    assert torch.equal(true_indices(mask[..., 1:]), mask[..., 1:].reshape(-1).nonzero().squeeze(1))


@settings(deadline=None)
@given(
    groups=st.integers(0, 12),
    members=st.sampled_from([1, 2, 4, 8]),
    columns=st.integers(0, 20),
    height=st.sampled_from([-9000, 0, 1500, 2500, 9000]),
    per_column=st.booleans(),
    dtype=whole,
    seed=st.integers(0, 999),
)
def test_what_reaches_a_level(
    groups: int, members: int, columns: int, height: int, per_column: bool, dtype: torch.dtype, seed: int
) -> None:
    """In tiles of different sizes in turn, each in the memory of the one before."""
    reaching = ThresholdSearch()
    for several in (groups, groups, max(0, groups - 1)):
        tile = numbers([several, members, columns], dtype, seed)
        wide = torch.float64 if dtype.is_floating_point else dtype
        level = numbers([columns], dtype, seed + 1) // 8 + height if per_column else torch.tensor(height)
        level = level.to(dtype)
        found = reaching.find(tile, reaching.largest(tile), level)
        wanted = (tile.to(wide) >= level.to(wide)).view(-1).nonzero().squeeze(1)
        assert torch.equal(found.sort().values, wanted)
        owners = found // max(1, members * columns)
        assert (owners.diff() >= 0).all(), "group by group"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("where", ["tile", "level"])
def test_nan_is_found(dtype: torch.dtype, where: str) -> None:
    given = {"tile": torch.full((16, 8, 32), -1.0, dtype=dtype), "level": torch.zeros(32)}
    given[where].view(-1)[5] = torch.nan
    reaching, tile = ThresholdSearch(), given["tile"]
    found = reaching.find(tile, reaching.largest(tile), given["level"])
    assert found.tolist() == ([5] if where == "tile" else list(range(5, tile.numel(), 32)))


@pytest.mark.parametrize("count, members", [(4096, 8), (12, 4), (10, 2), (7, 1), (0, 8)])
def test_the_group_size_divides_the_count(count: int, members: int) -> None:
    assert ThresholdSearch.members(count) == members
