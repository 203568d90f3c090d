from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hub_scripts.gated_against_baseline import RESCALED, SPARSITIES, Comparison, Outcome, candidates, l0_ratio, tables

pytestmark = pytest.mark.slow

ONE = Outcome("resid_post.1", "gated", 1.0, 0, l0=10.0, loss_recovered=0.9, fvu=0.1, gamma=1.0, dead=0.0)


def test_every_method_is_trained_at_every_sparsity():
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    comparison = Comparison(width=16, steps=24, batch_size=64)
    found = [(name, sparsity, sae) for name, sparsity, sae in candidates(comparison, "resid_post.1", 0, x)]
    assert [each[:2] for each in found] == [
        *(("gated", sparsity) for sparsity in SPARSITIES["gated"]),
        *((name, sparsity) for sparsity in SPARSITIES["standard"] for name in ("standard", RESCALED)),
    ]
    by_name = {name: sae for name, _, sae in found}
    assert (by_name["gated"].config.d_sae, by_name["standard"].config.d_sae) == (16, 24)
    assert torch.equal(by_name[RESCALED].W_dec, by_name["standard"].W_dec)
    assert not torch.equal(by_name[RESCALED].b_mag, by_name["standard"].b_enc)


def test_ratios_are_taken_at_equal_loss_recovered_between_points_only():
    gated = [ONE, replace(ONE, l0=50.0, loss_recovered=0.99)]  # no baseline SAE recovers as much
    baseline = [replace(ONE, l0=16.0, loss_recovered=0.88), replace(ONE, l0=64.0, loss_recovered=0.92)]
    assert l0_ratio(gated, baseline) == pytest.approx([32.0 / 10.0])  # halfway between their logarithms


def test_the_tables_have_means_and_spreads():
    outcomes = [ONE, replace(ONE, l0=12.0, seed=1)]
    outcomes += [
        replace(each, method=method, l0=each.l0 * times, loss_recovered=value)
        for each in outcomes
        for method, times in (("standard", 2), (RESCALED, 1.5))
        for value in (0.9,)
    ]
    text = tables(outcomes)
    assert "| resid_post.1 | gated | 1 | 11 ± 1.4 | 0.9 ± 0 |" in text
    assert "| resid_post.1 | 1 | 2.00 | 1.50 |" in text
