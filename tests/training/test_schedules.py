from __future__ import annotations

import pytest

from hf_gated_sae.training.schedules import LearningRateDip, linear_warmup


def test_the_warmup_rises_evenly_and_stays_at_one():
    assert [linear_warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert linear_warmup(0, 0) == 1.0


def test_the_dip_starts_low_and_returns_along_a_cosine():
    dip = LearningRateDip(low=0.1, steps=1000)
    assert dip.factor(0) == dip.factor(10_000) == 1.0
    dip.start(50)
    assert dip.factor(49) == 1.0
    assert dip.factor(50) == pytest.approx(0.1)
    assert dip.factor(550) == pytest.approx(0.55)
    assert dip.factor(1050) == 1.0
    factors = [dip.factor(step) for step in range(50, 1051)]
    assert factors == sorted(factors)
