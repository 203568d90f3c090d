"""TopK without a ReLU, and ranked by latent times decoder norm, compared with numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae import SAEModel
from hf_gated_sae.functional import topk
from tests.architectures.references import topk as reference
from tests.support.example_saes import assert_same, build, randomised

OPTIONS = [(True, False), (True, True), (False, False), (False, True)]


def example(rectified: bool, by_norm: bool, seed: int = 0, **settings: Any) -> SAEModel:
    sae = build("topk", rectified=rectified, rank_by_decoder_norm=by_norm, **settings)
    sae = randomised(sae, seed).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.05, 3, len(sae.W_dec), dtype=torch.float64).flip(0)[:, None])
    return sae


@settings(max_examples=40, deadline=None)
@given(option=st.sampled_from(OPTIONS), seed=st.integers(0, 2**20), d_sae=st.integers(1, 24), share=st.floats(0, 1))
def test_every_combination_equals_numpy(option: tuple[bool, bool], seed: int, d_sae: int, share: float) -> None:
    sae = example(*option, seed, d_sae=d_sae, k=1 + int(share * (d_sae - 1)))
    x = np.random.default_rng(seed).normal(size=(5, sae.config.d_in))
    latents = reference.encode(x, {name: tensor.numpy() for name, tensor in sae.state_dict().items()}, sae.config)
    output = sae(torch.from_numpy(x))
    np.testing.assert_allclose(output.latents.detach().numpy(), latents, rtol=1e-10, atol=1e-12)
    W_dec, b_dec = (sae.state_dict()[name].numpy() for name in ("W_dec", "b_dec"))
    np.testing.assert_allclose(output.reconstruction.detach().numpy(), latents @ W_dec + b_dec, rtol=1e-10, atol=1e-12)


def test_negative_latents_are_kept_where_fewer_are_positive() -> None:
    z = torch.tensor([[3.0, -1.0, 2.0, -5.0]])
    assert topk(z, 3, rectified=False).tolist() == [[3.0, -1.0, 2.0, 0.0]]
    assert topk(z, 3).tolist() == [[3.0, 0.0, 2.0, 0.0]]


def test_weights_affect_the_selection_and_not_the_values() -> None:
    z = torch.tensor([[3.0, 2.0, 1.0, -9.0]])
    assert topk(z, 1, weights=torch.tensor([0.1, 0.1, 5.0, 9.0])).tolist() == [[0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("rectified, by_norm", OPTIONS)
def test_the_options_are_saved_and_some_latents_are_a_slice_of_all(
    rectified: bool, by_norm: bool, tmp_path: Path
) -> None:
    sae = example(rectified, by_norm)
    sae.float().save_pretrained(tmp_path)
    assert_same(SAEModel.from_pretrained(tmp_path), sae)
    sae = sae.double()
    x = torch.randn(4, sae.config.d_in, dtype=torch.float64)
    torch.testing.assert_close(sae.encode(x, [3, 0]), sae.encode(x)[:, [3, 0]])


@pytest.mark.parametrize("rectified, by_norm", OPTIONS)
def test_every_parameter_learns(rectified: bool, by_norm: bool) -> None:
    sae = example(rectified, by_norm)
    sae.training_loss(torch.randn(64, sae.config.d_in, dtype=torch.float64)).total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in sae.parameters())
