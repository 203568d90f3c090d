"""Normalisations against their equations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gated_sae.functional.normalization import NORMALIZATIONS

X = np.random.default_rng(0).normal(0.4, 2.0, (5, 8))
MEAN = X.mean(-1, keepdims=True)
EPS = 1e-3
DEVIATION = X.std(-1, ddof=1, keepdims=True)
ENTERED = {
    "center": X - MEAN,
    "layer_norm": (X - MEAN) / (DEVIATION + 1e-5),
    "unit_norm": X * np.sqrt(8) / np.linalg.norm(X, axis=-1, keepdims=True),
    "rms_norm": X / np.sqrt((X**2).mean(-1, keepdims=True) + EPS),
    "standardize": (X - MEAN) / np.sqrt(X.var(-1, keepdims=True) + EPS),
}
LEFT = {
    "center": lambda y: y + MEAN,
    "layer_norm": lambda y: y * DEVIATION + MEAN,
    "unit_norm": lambda y: y * np.linalg.norm(X, axis=-1, keepdims=True) / np.sqrt(8),
    "rms_norm": lambda y: y * np.sqrt((X**2).mean(-1, keepdims=True) + EPS),
    "standardize": lambda y: y * np.sqrt(X.var(-1, keepdims=True) + EPS) + MEAN,
}


def test_every_normalisation_has_equations_here() -> None:
    assert set(ENTERED) == set(LEFT) == set(NORMALIZATIONS)


@pytest.mark.parametrize("name", list(NORMALIZATIONS))
def test_apply_and_undo(name: str) -> None:
    frame = NORMALIZATIONS[name](torch.from_numpy(X), EPS)
    np.testing.assert_allclose(frame.apply(torch.from_numpy(X)).numpy(), ENTERED[name], rtol=1e-12)
    y = np.random.default_rng(1).normal(size=X.shape)
    np.testing.assert_allclose(frame.undo(torch.from_numpy(y)).numpy(), LEFT[name](y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["rms_norm", "standardize"])
def test_models_norms_are_computed_in_float32(name: str) -> None:
    x = torch.from_numpy(X).bfloat16()
    frame, exact = NORMALIZATIONS[name](x, EPS), NORMALIZATIONS[name](x.double(), EPS)
    assert frame.scale.dtype == torch.bfloat16
    assert torch.equal(frame.scale, exact.scale.bfloat16())
