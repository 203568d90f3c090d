"""No projection above its cut is missed, whichever arithmetic rules out the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gated_sae.functional.activations import lowest_projection
from hf_gated_sae.functional.cpu import bf16_screening, tiled_projection
from hf_gated_sae.functional.cpu.tiled_projection import above

same_for_all = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
roundings = pytest.mark.parametrize("rounding", [False, True])


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen even on a CPU without bfloat16, which only takes longer for the same product."""
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screen even few tokens, in several tiles."""
    monkeypatch.setattr(bf16_screening, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(bf16_screening, "DENSEST", 1.0)
    monkeypatch.setattr(tiled_projection, "TILE", 64)


def dense(found: tuple[torch.Tensor, ...], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Put projections into a table, which is -inf elsewhere."""
    tokens, latents, projections = found
    table = torch.full((len(x), len(weight)), -torch.inf, dtype=x.dtype)
    table[tokens, latents] = projections
    assert len(tokens) == (table > -torch.inf).sum() + table.isnan().sum()
    return table


@same_for_all
@given(
    tokens=st.integers(1, 30),
    d_in=st.integers(1, 40),
    d_sae=st.integers(1, 50),
    level=st.floats(-2, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_every_projection_above_the_cut(
    small: None, tokens: int, d_in: int, d_sae: int, level: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64).to(dtype)
    cut = (torch.randn(d_sae, generator=generator, dtype=torch.float64) + level * d_in**0.5).to(dtype)
    found, wanted = above(x, weight, cut), x.double() @ weight.double().T
    table = dense(found, x, weight)
    slack = 1e-13 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 4e-2
    surely = wanted > cut.double() + slack * (1 + wanted.abs())
    assert (table > -torch.inf)[surely].all()
    there = table > -torch.inf
    torch.testing.assert_close(table[there].double(), wanted[there], rtol=slack, atol=10 * slack)


@same_for_all
@given(
    d_in=st.integers(1, 300),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    kind=st.sampled_from(["normal", "ones", "all rounded down", "one large"]),
    seed=st.integers(0, 9999),
)
def test_the_screen_misses_nothing_just_above_the_cut(
    small: None, screened: None, d_in: int, scale: float, kind: str, seed: int
) -> None:
    """Cuts lie just below exact projections, where rounding to bfloat16 decides wrongly in about half of them."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(40, d_in, generator=generator), torch.randn(24, d_in, generator=generator)
    if kind == "ones":
        x, weight = torch.ones_like(x), torch.ones_like(weight)
    elif kind == "all rounded down":  # as far as possible, where the exact sum is all rounding error
        x, weight = torch.full_like(x, 1 + 2**-8 - 2**-20), torch.full_like(weight, 1 + 2**-8 - 2**-20)
        x[:, d_in // 2 :], weight[:, d_in // 2 :] = 1, -1
    elif kind == "one large":
        x[:, 0] *= 1e3
    x = x * scale
    exact = x.double() @ weight.double().T
    token = torch.randint(0, 40, (24,), generator=generator)
    at = exact[token, torch.arange(24)]
    cut = (at - 1e-7 * at.abs() - 1e-38).float()
    found = bf16_screening.BoundedScreen(x).above(weight, cut)
    assert found is not None
    table = dense(found, x, weight)
    assert (table[token, torch.arange(24)] > -torch.inf).all()
    assert (table > -torch.inf)[exact > cut.double()].all()


@roundings
def test_the_screen_computes_few_projections(screened: None, rounding: bool) -> None:
    """Those are as exact as a product in float32, or as one in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 768, generator=generator), torch.randn(2048, 768, generator=generator) / 768**0.5
    cut = torch.full((2048,), 2.66)
    assert bf16_screening.serves(x, weight, cut)
    tokens, latents, projections = above(x, weight, cut, rounding=rounding)
    exact = x.double() @ weight.double().T
    on = exact > 2.66
    if rounding:  # about as many are missed as are found wrongly
        assert 0.99 < len(tokens) / on.sum() < 1.01 and on[tokens, latents].float().mean() > 0.98
    else:
        assert on.sum() < len(tokens) < 2 * on.sum() and on[tokens, latents].sum() == on.sum()
    slack = 2e-2 if rounding else 1e-5
    torch.testing.assert_close(projections.double(), exact[tokens, latents], rtol=0, atol=slack)


@pytest.mark.parametrize("why", ["few tokens", "dtype", "gradient", "width"])
def test_where_the_screen_does_not_serve(screened: None, why: str) -> None:
    tokens, dtype = 4 if why == "few tokens" else 512, torch.float64 if why == "dtype" else torch.float32
    x, weight, cut = torch.ones(tokens, 8, dtype=dtype), torch.ones(16, 8, dtype=dtype), torch.ones(16, dtype=dtype)
    if why == "width":
        weight = torch.ones(8, 16).T
    if why == "gradient":
        x.requires_grad_()
    assert not bf16_screening.serves(x, weight, cut)


@pytest.mark.parametrize("how", ["multiplied", "bounded", "rounded"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("where", ["x", "weight", "cut"])
def test_nonfinite_projections_are_found(
    small: None, monkeypatch: pytest.MonkeyPatch, how: str, bad: float, where: str
) -> None:
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", how != "multiplied")
    tensors = {"x": torch.ones(5, 7), "weight": torch.ones(9, 7), "cut": torch.zeros(9)}
    tensors[where].reshape(-1)[3] = bad
    table = dense(above(**tensors, rounding=how == "rounded"), tensors["x"], tensors["weight"])
    plain = tensors["x"] @ tensors["weight"].T
    wanted = ~(plain <= tensors["cut"])
    assert torch.equal((table != -torch.inf)[wanted], torch.ones(int(wanted.sum()), dtype=torch.bool))
    assert torch.equal(table[wanted].isnan(), plain[wanted].isnan())


@pytest.mark.parametrize("available", [False, True])
@roundings
def test_none_if_too_many_are_above_the_cut(
    small: None, monkeypatch: pytest.MonkeyPatch, available: bool, rounding: bool
) -> None:
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", available)
    x, weight = torch.randn(20, 6), torch.randn(32, 6)
    assert above(x, weight, torch.full((32,), -100.0), most=0.5, rounding=rounding) is None
    assert above(x, weight, torch.full((32,), 100.0), most=0.5, rounding=rounding) is not None


def test_a_dense_tile_is_multiplied(small: None, screened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_screening, "DENSEST", 0.1)
    x, weight, cut = torch.randn(20, 6), torch.randn(32, 6), torch.full((32,), -100.0)
    found = above(x, weight, cut)
    torch.testing.assert_close(dense(found, x, weight), x @ weight.T)


@pytest.mark.parametrize("tokens", [1, tiled_projection.FEW, tiled_projection.FEW + 1])
def test_transposed_weights(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, 6, generator=generator), torch.randn(6, 300, generator=generator).T
    cut = torch.full((300,), 1.0)
    found, plain = above(x, weight, cut), above(x, weight.contiguous(), cut)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and len(found[0]) > 0
    torch.testing.assert_close(found[2], plain[2])


@pytest.mark.parametrize("tokens, d_sae", [(0, 5), (3, 0), (0, 0)])
def test_empty_input(tokens: int, d_sae: int) -> None:
    found = above(torch.ones(tokens, 4), torch.ones(d_sae, 4), torch.zeros(d_sae))
    assert [len(column) for column in found] == [0, 0, 0]


@settings(deadline=None)
@given(
    st.floats(0, 10),
    st.floats(-10, 10),
    st.integers(-40, 40),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_no_rounding_lifts_a_projection_over_the_threshold(
    threshold: float, bias: float, steps: int, dtype: torch.dtype
) -> None:
    """At the cut and a few representable numbers around it, every active latent is above the cut."""
    level, added = torch.tensor(threshold, dtype=dtype), torch.tensor([bias], dtype=dtype)
    cut = lowest_projection(level, added)
    projection = (level - added) * (1 + steps * torch.finfo(dtype).eps)
    if (projection + added > level).any():
        assert (projection > cut).all()
