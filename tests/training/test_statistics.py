from __future__ import annotations

import pytest
import torch

from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.training.statistics import measure


def test_size_and_mean_are_those_of_the_whole_sample():
    x = torch.randn(100, 5) + 2
    statistics = measure(x.split(33))
    assert statistics.count == 100
    assert statistics.mean_square_norm == pytest.approx(x.square().sum(-1).mean().item())
    torch.testing.assert_close(statistics.centre, x.mean(0))


def test_the_geometric_median_withstands_outliers_that_move_the_mean():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    outliers = torch.cat([x, torch.full((100, 5), 1000.0)])
    assert measure([outliers], centre="mean").centre.norm() > 100
    assert measure([outliers], centre="geometric_median").centre.norm() < 1


def test_the_geometric_median_has_the_least_summed_distance():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)).exp()
    centre = measure([x], centre="geometric_median").centre
    best = (x - centre).norm(dim=-1).sum()
    for step in 0.05 * torch.cat([torch.eye(3), -torch.eye(3)]):
        assert (x - centre - step).norm(dim=-1).sum() > best


def test_unusable_activations_are_refused():
    with pytest.raises(InputError, match="1 of 2 activations are NaN or infinite"):
        measure([torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])])
    with pytest.raises(InputError, match="no activations"):
        measure([])
    with pytest.raises(UnknownNameError, match="Did you mean 'mean'"):
        measure([torch.ones(1, 1)], centre="meen")
