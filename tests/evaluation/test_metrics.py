from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.functional import FidelityAccumulator, loss_recovered


def accumulate(x, y, latents, cuts=()):
    accumulator = FidelityAccumulator(latents.shape[-1], torch.full((x.shape[-1],), 0.3))
    edges = [0, *sorted(cuts), len(x)]
    for start, end in zip(edges, edges[1:], strict=False):
        accumulator.update(x[start:end], y[start:end], latents[start:end])
    return accumulator


def test_gamma_of_a_reconstruction_at_half_strength_is_a_half():
    accumulator = accumulate(torch.ones(1, 1), torch.full((1, 1), 0.5), torch.ones(1, 1))
    assert accumulator.compute().relative_reconstruction_bias == 0.5


@pytest.mark.parametrize("strength", [0.25, 1.0, 3.0])
def test_gamma_is_the_factor_that_would_undo_the_shrinkage(strength):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator).double()
    noise = torch.randn(500, 4, generator=generator).double()
    noise -= (noise * x).sum() / x.square().sum() * x  # an error orthogonal to x
    reconstruction = strength * (x + 0.1 * noise)
    gamma = accumulate(x, reconstruction, torch.ones(500, 1)).compute().relative_reconstruction_bias

    def error(factor):
        return (reconstruction / factor - x).square().sum()

    assert error(gamma) < min(error(gamma * 1.001), error(gamma / 1.001))
    assert gamma == pytest.approx(strength * 1.01, rel=5e-3)


def test_the_centred_gamma_sees_shrinkage_that_a_large_mean_hides():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((4,), 100.0)
    x = torch.randn(1000, 4, generator=generator)
    accumulator = FidelityAccumulator(1, mean)
    accumulator.update(mean + x, mean + 0.5 * x, torch.ones(1000, 1))
    metrics = accumulator.compute()
    assert metrics.relative_reconstruction_bias == pytest.approx(1.0, abs=1e-3)
    assert metrics.relative_reconstruction_bias_centred == pytest.approx(0.5, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 99))
def test_the_metrics_do_not_depend_on_how_the_text_is_split(count, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    x, error = torch.randn(2, count, 3, generator=generator)
    latents = torch.relu(torch.randn(count, 7, generator=generator))
    whole = accumulate(x, x + error, latents)
    parts = accumulate(x, x + error, latents, [min(cut, count) for cut in cuts])
    assert asdict(parts.compute()) == pytest.approx(asdict(whole.compute()), rel=1e-9, nan_ok=True)
    assert torch.equal(parts.fired, whole.fired) and torch.equal(parts.max_activation, whole.max_activation)
    torch.testing.assert_close(parts.mean_activation, whole.mean_activation)


def test_fvu_is_one_for_the_mean_and_zero_for_a_copy():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) + 4
    latents = torch.ones(300, 2)
    assert accumulate(x, x.mean(0).expand_as(x), latents).compute().fvu == pytest.approx(1.0, abs=1e-6)
    assert accumulate(x, x, latents).compute().fvu == 0.0


def test_an_activation_of_zero_has_no_ratio_of_norms():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    y = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 0.0]])
    latents = torch.ones(4, 1)
    assert accumulate(x, y, latents).compute().norm_ratio == pytest.approx((0.6 + 1.5) / 2)
    assert math.isnan(accumulate(x[1::2], y[1::2], latents[:2]).compute().norm_ratio)
    x[1, 0] = math.nan  # a NaN is not hidden
    assert math.isnan(accumulate(x, y, latents).compute().norm_ratio)


def test_dead_and_dense_latents_are_counted_over_all_tokens():
    latents = torch.zeros(100, 4)
    latents[:5, 0] = latents[:50, 1] = 1.0
    metrics = accumulate(torch.ones(100, 1), torch.ones(100, 1), latents).compute()
    assert metrics.dead_fraction == 0.5 and metrics.dense_fraction == 0.25
    assert metrics.l0 == pytest.approx(0.55)


def test_loss_recovered_is_neither_clipped_nor_invented():
    assert loss_recovered(2.0, 2.0, 5.0) == 1.0
    assert loss_recovered(2.0, 5.0, 5.0) == 0.0
    assert loss_recovered(2.0, 1.0, 5.0) > 1.0
    assert loss_recovered(2.0, 9.0, 5.0) < 0.0
    assert math.isnan(loss_recovered(2.0, 2.0, 2.0))
