"""Memory of gradients is used again when nobody sees it any more, and never before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gated_sae.functional import gradient_memory
from hf_gated_sae.functional.gradient_memory import forget, memory_for
from hf_gated_sae.functional.support import LATENTS_AT_ONCE, LiveSupport

D_SAE, TOKENS = 2 * LATENTS_AT_ONCE + 300, 700


def test_this_build_of_torch_tells_who_holds_memory() -> None:
    assert gradient_memory._ALONE is not None


def test_memory_is_given_out_again() -> None:
    weight = nn.Parameter(torch.ones(5, 3))
    first = memory_for(weight)
    place = first.data_ptr()
    assert first.shape == (5, 3) and first.dtype == torch.float32
    del first
    again = memory_for(weight)
    assert again.data_ptr() == place
    assert memory_for(weight).data_ptr() != place, "it is in use"
    assert memory_for(nn.Parameter(torch.ones(5, 3))).data_ptr() != place
    del again
    forget([weight, nn.Parameter(torch.ones(2))])
    assert weight not in gradient_memory._kept


@pytest.mark.parametrize(
    "hold",
    [
        lambda grad: grad,
        lambda grad: grad.detach(),
        lambda grad: grad[1:],
        lambda grad: grad.T,
        lambda grad: grad.numpy(),
        lambda grad: grad.untyped_storage(),
        lambda grad: memoryview(grad.numpy()),
        lambda grad: torch.utils.dlpack.to_dlpack(grad),
    ],
    ids=["itself", "detached", "view", "transposed", "array", "storage", "buffer", "dlpack"],
)
def test_what_somebody_still_sees_is_left_alone(hold: Callable[[Tensor], Any]) -> None:
    weight = nn.Parameter(torch.ones(5, 3))
    grad = memory_for(weight).zero_()
    held = hold(grad)
    del grad
    memory_for(weight).fill_(7.0)
    kept = gradient_memory._kept[weight]
    assert (kept == 0).all()
    del held
    gc.collect()
    assert memory_for(weight).data_ptr() == kept.data_ptr()


def test_memory_goes_with_the_weights() -> None:
    weight = nn.Parameter(torch.ones(5, 3))
    memory_for(weight)
    before = len(gradient_memory._kept)
    del weight
    gc.collect()
    assert len(gradient_memory._kept) == before - 1


def test_weights_that_have_become_others_get_other_memory() -> None:
    weight = nn.Parameter(torch.ones(5, 3))
    memory_for(weight)
    weight.data = torch.ones(4, 2, dtype=torch.float64)
    assert (memory_for(weight).shape, memory_for(weight).dtype) == ((4, 2), torch.float64)


def backward(W_enc_T: nn.Parameter, W_dec: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64)
    support = LiveSupport.above(x, None, W_enc_T, torch.full((D_SAE,), 6.0, dtype=torch.float64))
    assert support is not None and 0 < len(support.latents) < 0.05 * TOKENS * D_SAE
    support.decode(support.projection, W_dec).square().sum().backward()


def weights() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return tuple(nn.Parameter(torch.randn(D_SAE, 6, generator=generator, dtype=torch.float64)) for _ in range(2))


@pytest.mark.parametrize("available", [True, False])
def test_gradients_are_the_same_at_every_step(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """In the memory of an earlier gradient, with one that is held, and with one that is added to."""
    mine, held, places = weights(), [], []
    for step in range(6):
        monkeypatch.setattr(gradient_memory, "_ALONE", gradient_memory._alone() if available else None)
        for part in range(1 + step % 2):
            backward(*mine, seed=10 * step + part)
        fresh = weights()
        for part in range(1 + step % 2):
            backward(*fresh, seed=10 * step + part)
        for one, other in zip(mine, fresh, strict=True):
            assert torch.equal(one.grad, other.grad)
        if step == 2:
            held = [(each.grad, each.grad.clone()) for each in mine]
        places.append(mine[0].grad.data_ptr())
        for each in mine:
            each.grad = None
    assert all(torch.equal(one, other) for one, other in held)
    assert held[0][0].data_ptr() not in places[3:]
    if available:
        assert len({*places[:3]}) == 1
