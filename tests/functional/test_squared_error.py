"""The squared error with its own derivative equals the plain one."""

from __future__ import annotations

import pytest
import torch

from hf_gated_sae.functional.squared_error import squared_error


def plain(target: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    return (target - reconstruction).square().sum(-1).mean()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("wanted", ["target", "reconstruction", "both"])
def test_value_and_gradients(shape: tuple[int, ...], wanted: str) -> None:
    torch.manual_seed(0)
    found = []
    tensors = torch.randn(2, *shape, dtype=torch.float64)
    for error in (squared_error, plain):
        target, reconstruction = (each.clone() for each in tensors)
        target.requires_grad_(wanted != "reconstruction")
        reconstruction.requires_grad_(wanted != "target")
        value = error(target, reconstruction)
        (3 * value).backward()
        found.append((value.detach(), target.grad, reconstruction.grad))
    for own, expected in zip(*found, strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_exact_reconstruction_has_a_gradient() -> None:
    target = torch.randn(4, 6)
    reconstruction = target.clone().requires_grad_()
    squared_error(target, reconstruction).backward()
    assert reconstruction.grad is not None and not reconstruction.grad.any()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_half_precision_is_left_to_autograd(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    target, reconstruction = (torch.randn(4, 6).to(dtype) for dtype in dtypes)
    assert torch.equal(squared_error(target, reconstruction), plain(target, reconstruction))


def test_function_transforms_are_left_to_autograd() -> None:
    torch.manual_seed(0)
    target, reconstruction = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    found = torch.func.vmap(torch.func.grad(squared_error, argnums=1))(target, reconstruction)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(plain, argnums=1))(target, reconstruction))
