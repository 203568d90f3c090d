"""The highest projections of each token, whichever arithmetic rules out the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gated_sae import TopKSAE, TopKSAEConfig
from hf_gated_sae.functional.cpu import bf16_screening

same_for_all = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen even on a CPU without bfloat16, which only takes longer for the same product."""
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen even few tokens, in several parts."""
    monkeypatch.setattr(bf16_screening, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(bf16_screening, "DENSEST", 1.0)
    monkeypatch.setattr(bf16_screening, "_TOKENS_AT_ONCE", 16)


@same_for_all
@given(
    d_in=st.integers(1, 300),
    d_sae=st.integers(8, 120),
    k=st.integers(1, 4),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    kind=st.sampled_from(["normal", "close together", "one large", "large biases", "all alike"]),
    seed=st.integers(0, 9999),
)
def test_no_highest_projection_is_missed(
    small: None, d_in: int, d_sae: int, k: int, scale: float, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(40, d_in, generator=generator), torch.randn(d_sae, d_in, generator=generator)
    bias = torch.randn(d_sae, generator=generator)
    if kind == "close together":  # rounding to bfloat16 decides wrongly in about half of the cases
        weight, bias = weight[:1] * (1 + 1e-4 * torch.randn(d_sae, 1, generator=generator)), bias * 1e-4
    elif kind == "one large":
        x[:, 0] *= 1e3
    elif kind == "large biases":
        bias *= 1e3
    elif kind == "all alike":
        weight, bias = torch.ones_like(weight), torch.zeros_like(bias)
    x, bias = x * scale, bias * scale
    found = bf16_screening.highest(x, weight, bias, k)
    if d_sae < bf16_screening._BLOCKS_PER_KEPT * k:
        assert found is None
        return
    assert found is not None
    latents, projections = found
    values = projections + bias[latents]
    assert latents.shape == values.shape == (40, k)
    assert (latents.sort().values.diff() > 0).all(), "each once"
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max() + bias.double().abs().max()
    slack = 1e-5 * size
    assert ((values - exact.gather(1, latents)).abs() <= slack).all()
    kth = exact.topk(k).values[:, -1:]
    assert (exact.gather(1, latents) >= kth - 2 * slack).all()


@pytest.mark.parametrize("rounding", [False, True])
def test_few_projections_are_computed(monkeypatch: pytest.MonkeyPatch, rounding: bool) -> None:
    computed = []
    dots = bf16_screening.pair_dots
    monkeypatch.setattr(bf16_screening, "pair_dots", lambda *given: computed.append(len(given[2])) or dots(*given))
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1024, 256, generator=generator), torch.randn(4096, 256, generator=generator)
    found = bf16_screening.highest(x, weight, torch.zeros(4096), 16, rounding=rounding)
    assert found is not None
    assert not computed if rounding else 16 * 1024 <= sum(computed) < 64 * 1024
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(
        found[1].double(), exact.gather(1, found[0]), rtol=2**-8 * rounding, atol=0.2 if rounding else 1e-4
    )
    values = exact.gather(1, found[0]).sort(descending=True).values
    short = (values < exact.topk(16).values - 1e-4).double().mean()  # where another latent was selected
    assert short < (0.02 if rounding else 1e-9)


@pytest.mark.parametrize("what", ["x", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rounding", [False, True])
def test_nonfinite_input_is_left_to_the_dense_product(small: None, what: str, value: float, rounding: bool) -> None:
    tensors = {"x": torch.randn(20, 8), "weight": torch.randn(64, 8), "bias": torch.randn(64)}
    tensors[what].view(-1)[3] = value
    assert bf16_screening.highest(**tensors, k=2, rounding=rounding) is None


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize(
    "x, weight, bias", [(1e19, 1e19, 0.0), (1e30, 1e25, 1.0), (1.0, 1.0, 3.39e38), (1.0, 1.0, -3e38)]
)
def test_overflow_is_left_to_the_dense_product(
    small: None, x: float, weight: float, bias: float, rounding: bool
) -> None:
    biases = torch.zeros(64)
    biases[5] = bias
    found = bf16_screening.highest(torch.randn(20, 8) * x, torch.randn(64, 8) * weight, biases, 2, rounding=rounding)
    assert found is None
    tokens = torch.randn(20, 8) * x
    assert bf16_screening.screen_of(tokens, rounding=rounding).above(torch.randn(64, 8) * weight, -biases) is None


def test_too_many_close_projections_are_left_to_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_screening, "FEWEST_TOKENS", 1)
    assert bf16_screening.highest(torch.ones(20, 8), torch.ones(640, 8), torch.zeros(640), 2) is None


@pytest.mark.parametrize("settings", [{}, {"rectified": False}, {"rank_by_decoder_norm": True}], ids=str)
@torch.no_grad()
def test_a_topk_sae_has_the_same_latents(monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool]) -> None:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=2048, k=8, **settings)).eval()
    sae.b_enc.normal_()
    sae.W_dec.mul_(torch.rand(2048, 1) + 0.5)
    x = torch.randn(600, 32)
    screened = sae.encode_sparse(x), sae.reconstruct(x)
    monkeypatch.setattr(bf16_screening, "serves", lambda *_: False)
    torch.testing.assert_close(screened[0].dense(), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(screened[1], sae.reconstruct(x), rtol=1e-5, atol=1e-5)
