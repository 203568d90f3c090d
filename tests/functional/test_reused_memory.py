"""Memory is reused once nothing refers to it any more, and never before."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gated_sae.functional.cpu import SparseSupport, reused_memory
from hf_gated_sae.functional.cpu.reused_memory import ReusedMemory, forget
from hf_gated_sae.functional.cpu.sparse_pairs import LATENTS_AT_ONCE

pytestmark = pytest.mark.slow

D_SAE, TOKENS = 2 * LATENTS_AT_ONCE + 300, 700


def test_this_build_of_torch_counts_the_holders_of_memory() -> None:
    assert reused_memory._ALONE is not None


def test_released_memory_is_reused() -> None:
    weight, memory = nn.Parameter(torch.ones(5, 3)), ReusedMemory()
    first = memory.of(weight)
    place = first.data_ptr()
    assert first.shape == (5, 3) and first.dtype == torch.float32 and not first.requires_grad
    del first
    again = memory.of(weight)
    assert again.data_ptr() == place
    assert memory.of(weight).data_ptr() != place, "it is in use"
    assert memory.of(nn.Parameter(torch.ones(5, 3))).data_ptr() != place
    assert ReusedMemory().of(weight).data_ptr() != place, "for another purpose"
    del again
    forget([weight, nn.Parameter(torch.ones(2))])
    assert weight not in memory.kept


def test_as_much_is_kept_as_is_in_use_at_a_time() -> None:
    held, memory = torch.ones(40, 3), ReusedMemory(several=2)
    places, before = [], memory.of(held, (8, 3))
    for _ in range(6):
        following = memory.of(held, (8, 3), torch.float32)
        places.append(following.data_ptr())
        before = following
    assert len(set(places)) == 2 and before.shape == (8, 3)
    others = [memory.of(held, (8, 3)) for _ in range(3)]
    assert len({each.data_ptr() for each in (before, *others)}) == 4 and len(memory.kept[held]) == 2
    assert memory.of(held, (4, 3), torch.bfloat16).shape == (4, 3), "and memory of another shape is freed"
    assert [each.shape for each in memory.kept[held]] == [(4, 3)]


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
def test_memory_that_is_still_referenced_is_not_reused(hold: Callable[[Tensor], Any]) -> None:
    weight, memory = nn.Parameter(torch.ones(5, 3)), ReusedMemory()
    grad = memory.of(weight).zero_()
    held = hold(grad)
    del grad
    memory.of(weight).fill_(7.0)
    [kept] = memory.kept[weight]
    assert (kept == 0).all()
    del held
    gc.collect()
    assert memory.of(weight).data_ptr() == kept.data_ptr()


def test_memory_from_inference_mode_can_be_used_in_training() -> None:
    held, memory = torch.ones(5, 3), ReusedMemory()
    with torch.inference_mode():
        memory.of(held).fill_(1.0)
    again = memory.of(held).fill_(2.0)
    with torch.inference_mode():
        assert memory.of(held).data_ptr() != again.data_ptr()
    weight = torch.ones(3, requires_grad=True)
    (again @ weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 10.0))


def test_threads_do_not_get_the_same_memory() -> None:
    held, memory = torch.ones(5, 3), ReusedMemory(several=2)

    def differ(number: int) -> bool:
        mine = memory.of(held).fill_(number)
        time.sleep(1e-4)
        return bool((mine == number).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(differ, range(400)))


def test_memory_is_freed_with_the_weights() -> None:
    weight, memory = nn.Parameter(torch.ones(5, 3)), ReusedMemory()
    memory.of(weight)
    assert len(memory.kept) == 1
    del weight
    gc.collect()
    assert len(memory.kept) == 0


def test_weights_with_new_data_get_new_memory() -> None:
    weight, memory = nn.Parameter(torch.ones(5, 3)), ReusedMemory()
    memory.of(weight)
    weight.data = torch.ones(4, 2, dtype=torch.float64)
    assert (memory.of(weight).shape, memory.of(weight).dtype) == ((4, 2), torch.float64)


def backward(W_enc_T: nn.Parameter, W_dec: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64)
    support = SparseSupport.above(x, None, W_enc_T, torch.full((D_SAE,), 6.0, dtype=torch.float64))
    assert support is not None and 0 < len(support.latents) < 0.05 * TOKENS * D_SAE
    support.decode(support.projection, W_dec).square().sum().backward()


def weights() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return tuple(nn.Parameter(torch.randn(D_SAE, 6, generator=generator, dtype=torch.float64)) for _ in range(2))


@pytest.mark.parametrize("available", [True, False])
def test_gradients_are_the_same_at_every_step(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """With gradients in reused memory, a gradient that is still held, and accumulated gradients."""
    mine, held, places = weights(), [], []
    for step in range(6):
        monkeypatch.setattr(reused_memory, "storage_holders", reused_memory.storage_holders if available else None)
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
