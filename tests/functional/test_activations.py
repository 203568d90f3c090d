"""Thresholds have the same derivatives by every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_gated_sae import functional


@pytest.mark.parametrize("threshold", [torch.linspace(0.05, 1, 40), torch.tensor(0.4)], ids=["vector", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", [functional.jumprelu, functional.above_threshold])
def test_function_transforms_use_the_rectangle_estimate_for_thresholds(
    activation: Any, dtype: torch.dtype, threshold: torch.Tensor
) -> None:
    z = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)).to(dtype)

    def weighed(threshold: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (activation(z, threshold, bandwidth=0.5) * weights).double().sum()

    leaves = [threshold.clone().requires_grad_(), z.clone().requires_grad_()]
    plain = weighed(*leaves)
    gradients = torch.autograd.grad(plain, leaves, materialize_grads=True)
    assert gradients[0].any() and gradients[0].dtype == threshold.dtype
    torch._dynamo.reset()
    compiled = torch.compile(weighed, backend="aot_eager", fullgraph=True)
    ways = {
        "reverse": torch.func.grad_and_value(weighed, argnums=(0, 1))(threshold, z),
        "compiled": ((torch.autograd.grad(compiled(*leaves), leaves, materialize_grads=True)), compiled(*leaves)),
    }
    for name, (found, value) in ways.items():
        assert torch.equal(value, plain), name
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, msg=name)
    along = torch.rand(threshold.shape, generator=torch.Generator().manual_seed(2))
    value, tangent = torch.func.jvp(lambda each: weighed(each, z), (threshold,), (along,))
    assert torch.equal(value, plain)
    rounding = {"rtol": 1e-5 if dtype == torch.float64 else 1e-2, "atol": 1e-3}
    torch.testing.assert_close(tangent.float(), (gradients[0] * along).sum(), **rounding)


def test_a_threshold_that_nothing_reaches_has_no_derivative() -> None:
    never = torch.full((3,), float("inf"))

    def activated(threshold: torch.Tensor) -> torch.Tensor:
        return functional.jumprelu(torch.ones(2, 3), threshold)

    value, gradient = torch.func.jvp(activated, (never,), (torch.ones(3),))
    assert not value.any() and not gradient.any()
    assert not torch.func.grad(lambda threshold: activated(threshold).sum())(never).any()
    assert not torch.autograd.functional.jacobian(activated, never).any()
