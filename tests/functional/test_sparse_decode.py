"""Decoding from active latents is the dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_gated_sae.functional import sparse_decode
from hf_gated_sae.functional.sparse_decode import decode

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_decode, "SMALLEST", 1)


def latents_of(tokens: int, d_sae: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, d_sae, generator=generator, dtype=torch.float64)
    return values * (torch.rand(tokens, d_sae, generator=generator) < share)


@settings(deadline=None)
@given(
    tokens=st.integers(0, 9),
    d_sae=st.integers(1, 60),
    d_out=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.02, 0.06, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_dense_product(tokens: int, d_sae: int, d_out: int, share: float, seed: int) -> None:
    latents = latents_of(tokens, d_sae, share, seed)
    W_dec = torch.randn(d_sae, d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(decode(latents, W_dec), latents @ W_dec, **TIGHT)
    torch.testing.assert_close(decode(latents[None], W_dec), (latents @ W_dec)[None], **TIGHT)
    strided = W_dec.T.contiguous().T
    torch.testing.assert_close(decode(latents, strided), latents @ W_dec, **TIGHT)


@pytest.mark.parametrize("share, multiplies", [(0.01, False), (0.5, True)])
def test_rows_are_summed_where_few_latents_are_active(share: float, multiplies: bool) -> None:
    latents, W_dec = latents_of(16, 640, share), torch.randn(640, 8, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        decode(latents, W_dec)
    assert (counter.get_total_flops() > 0) == multiplies


def test_tokens_without_an_active_latent() -> None:
    latents = latents_of(5, 200, 0.03)
    latents[[0, 2, 4]] = 0
    found = decode(latents, torch.ones(200, 3, dtype=torch.float64))
    assert not found[[0, 2, 4]].any() and found[[1, 3]].any()


def test_nan_stays_visible() -> None:
    latents = latents_of(4, 200, 0.02)
    latents[1, 7] = float("nan")
    found = decode(latents, torch.ones(200, 3, dtype=torch.float64))
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()


def test_gradients_flow() -> None:
    latents = latents_of(6, 100, 0.05).requires_grad_()
    W_dec = torch.randn(100, 4, dtype=torch.float64, requires_grad=True)
    decode(latents, W_dec).sum().backward()
    torch.testing.assert_close(latents.grad, W_dec.detach().sum(1).expand(6, 100), **TIGHT)
    torch.testing.assert_close(W_dec.grad, latents.detach().sum(0)[:, None].expand(100, 4), **TIGHT)


def test_forward_derivatives_flow() -> None:
    W_dec, latents = torch.randn(100, 4, dtype=torch.float64), latents_of(6, 100, 0.05)
    _, tangent = torch.func.jvp(lambda values: decode(values, W_dec), (latents,), (torch.ones_like(latents),))
    torch.testing.assert_close(tangent, W_dec.sum(0).expand(6, 4), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_dense_product(dtype: torch.dtype) -> None:
    latents, W_dec = latents_of(6, 100, 0.05).to(dtype), torch.randn(100, 4).to(dtype)
    torch.testing.assert_close(decode(latents, W_dec), latents @ W_dec)
