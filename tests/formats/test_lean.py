"""Loading keeps one copy of every matrix: a layout's arithmetic happens in place, on pages that are private to us.

Copies inside one torch operation are not visible here; `test_folding.py` measures the memory of whole loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gated_sae.formats import Example, open_checkpoint
from tests.formats.test_conformance import every_example, examples_root, repo

__all__ = ["examples_root", "repo"]


class Allocations(TorchDispatchMode):
    """Records the size of every tensor that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@every_example
def test_no_matrix_is_copied(name: str, example: Example, repo: Path) -> None:
    checkpoint = open_checkpoint(str(repo), example.address)
    matrices = [tensor for tensor in checkpoint.stored.values() if tensor.ndim >= 2]
    smallest = min(tensor.nbytes // tensor.dtype.itemsize for tensor in matrices)
    with Allocations() as allocations:
        tensors = checkpoint.read(checkpoint.config)
    assert max(allocations.sizes) < smallest, f"{name} makes a tensor of {max(allocations.sizes)} values"
    assert all(tensor.dtype == tensors["W_dec"].dtype for key, tensor in tensors.items() if key == "W_enc_T")


def test_a_copy_would_be_noticed() -> None:
    with Allocations() as allocations:
        torch.ones(8).mul_(2)
        torch.ones(16) * 2
    assert max(allocations.sizes) == 16
