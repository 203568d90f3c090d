"""The geometric median, also where distances are zero or nearly so."""

import pytest
import torch

from hf_gated_sae.functional.geometry import geometric_median
from hf_gated_sae.training.statistics import measure


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_the_median_of_identical_points_is_that_point(count, scale):
    point = scale * torch.randn(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(geometric_median(point.expand(count, -1)), point)
    assert torch.equal(measure([point.expand(count, -1)], centre="geometric_median").centre, point)


@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1.0, 1e15])
def test_the_median_of_nearly_identical_points_is_finite_and_among_them(scale):
    point = scale * torch.randn(16, generator=torch.Generator().manual_seed(0))
    x = point.repeat(1000, 1)
    x[0, 0] = torch.nextafter(x[0, 0], torch.tensor(torch.inf))
    found = geometric_median(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, point, rtol=1e-5, atol=0.0)


def test_a_majority_at_one_point_outweighs_all_others():
    x = torch.cat([torch.ones(6, 4), 100 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))])
    torch.testing.assert_close(geometric_median(x), torch.ones(4), rtol=0.01, atol=0.01)
