"""Large products have the same result on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from hf_gated_sae.functional.cpu import products as module
from hf_gated_sae.functional.cpu.features import CPU
from hf_gated_sae.functional.linear import linear

sides = st.integers(1, 40)


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=sides, d_in=sides, n=sides, strided=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("blas_is_fast", [False, True])
def test_equals_the_product_in_float64(
    monkeypatch: pytest.MonkeyPatch,
    blas_is_fast: bool,
    rows: int,
    d_in: int,
    n: int,
    strided: tuple[bool, bool],
    seed: int,
) -> None:
    monkeypatch.setattr(module, "CPU", replace(CPU, intel_blas=blas_is_fast))
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, d_in, generator=generator), torch.randn(n, d_in, generator=generator)
    laid = [each.T.contiguous().T if other else each for each, other in zip((x, weight), strided, strict=True)]
    found = linear(*laid)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_leading_axes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*shape, 6).to(dtype), torch.randn(5, 6).to(dtype)
    found = linear(x, weight)
    assert found.shape == (*shape, 5) and found.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, nn.functional.linear(x, weight), **tolerance)


def test_no_latents() -> None:
    assert linear(torch.randn(3, 6), torch.randn(0, 6)).shape == (3, 0)


def test_gradients_flow() -> None:
    x, weight = torch.randn(3, 6, requires_grad=True), nn.Parameter(torch.randn(5, 6))
    linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(3, 6))
    assert torch.allclose(weight.grad, x.detach().sum(0).expand(5, 6))


def test_autocast_is_respected() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(3, 6), torch.randn(5, 6)).dtype == torch.bfloat16


def test_meta_tensors() -> None:
    assert linear(torch.empty(3, 6, device="meta"), torch.empty(5, 6, device="meta")).shape == (3, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_stay_visible(value: float) -> None:
    x = torch.ones(4, 6)
    x[1, 2] = value
    found = linear(x, torch.ones(5, 6))
    assert not torch.isfinite(found[1]).any() and torch.isfinite(found[[0, 2, 3]]).all()


def test_weights_at_any_byte_of_a_mapped_file() -> None:
    buffer = bytearray(4 * 5 * 64 + 3)
    for offset in range(4):
        weight = torch.frombuffer(buffer, dtype=torch.float32, count=5 * 64, offset=offset).view(5, 64)
        weight.copy_(torch.randn(5, 64))
        x = torch.randn(9, 64)
        torch.testing.assert_close(linear(x, weight), x @ weight.clone().T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(x[:, :5], weight.T), x[:, :5] @ weight.clone(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("wrapped", [False, True])
def test_forward_derivatives_are_not_lost(wrapped: bool) -> None:
    x, weight, along = torch.randn(3, 6), torch.randn(5, 6), torch.randn(3, 6)

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda row: linear(row[None], weight)[0])(x) if wrapped else linear(x, weight)

    torch.testing.assert_close(torch.func.jvp(product, (x,), (along,))[1], along @ weight.T)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(product(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(tangent, along @ weight.T)
    of_weight = torch.func.jvp(lambda weight: linear(x, weight), (weight,), (torch.ones_like(weight),))[1]
    torch.testing.assert_close(of_weight, x @ torch.ones_like(weight).T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_can_be_traced() -> None:
    weight, x = torch.randn(5, 6), torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.trace(lambda x: linear(x, weight), x)(x), x @ weight.T)
