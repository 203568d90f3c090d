"""Metrics from sparse latents equal those from dense latents."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import ShapeError
from hf_gated_sae.functional import FidelityAccumulator, SparseLatents


def batch(tokens: int, seed: int, signed: bool):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(tokens, 12, generator=generator)
    on = torch.rand(tokens, 12, generator=generator) < 0.3
    x, y = torch.randn(2, tokens, 5, generator=generator)
    return x, y, (latents if signed else latents.abs()) * on


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 99), st.booleans())
def test_sparse_latents_give_the_metrics_of_dense_ones(sizes, seed, signed):
    dense, live = (FidelityAccumulator(12, torch.ones(5)) for _ in range(2))
    for number, tokens in enumerate(sizes):
        x, y, latents = batch(tokens, seed + number, signed)
        dense.update(x, y, latents)
        live.update(x, y, SparseLatents.from_dense(latents))
    assert torch.equal(live.fired, dense.fired)
    assert torch.equal(live.max_activation, dense.max_activation)
    torch.testing.assert_close(live.mean_activation, dense.mean_activation, rtol=1e-6, atol=0)
    if sum(sizes):
        assert asdict(live.compute()) == pytest.approx(asdict(dense.compute()), nan_ok=True, rel=1e-12)


def test_leading_axes_are_kept_apart_from_latents():
    x, y, latents = batch(6, 0, False)
    whole, shaped = (FidelityAccumulator(12, torch.zeros(5)) for _ in range(2))
    whole.update(x, y, latents)
    shaped.update(x.view(2, 3, 5), y.view(2, 3, 5), SparseLatents.from_dense(latents.view(2, 3, 12)))
    assert shaped.compute() == whole.compute()
    with pytest.raises(ShapeError, match=r"latents \[6, 12\]"):
        shaped.update(x.view(2, 3, 5), y.view(2, 3, 5), SparseLatents.from_dense(latents))


def test_pooled_accumulators_equal_one_over_all_tokens():
    parts, whole = [FidelityAccumulator(12, torch.ones(5)) for _ in range(3)], FidelityAccumulator(12, torch.ones(5))
    for number, part in enumerate(parts):
        given = batch(4 + number, number, False)
        given[0][:number] = 0  # tokens without a ratio of norms
        part.update(*given)
        whole.update(*given)
    sent = []
    for part in parts:  # each sends its tensors and receives the pooled ones
        given = []
        FidelityAccumulator.pool(copy.deepcopy(part), lambda x: given.append(x) or x, lambda x: given.append(x) or x)
        sent.append(given)
    total, largest = sum(each[0] for each in sent), torch.stack([each[1] for each in sent]).amax(0)
    parts[1].pool(lambda x: total, lambda x: largest)
    assert asdict(parts[1].compute()) == pytest.approx(asdict(whole.compute()), rel=1e-12)
    assert torch.equal(parts[1].fired, whole.fired) and torch.equal(parts[1].max_activation, whole.max_activation)
    torch.testing.assert_close(parts[1].mean_activation, whole.mean_activation)
