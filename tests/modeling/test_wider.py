"""A dtype wider than the stored one is applied before the layout's arithmetic, not after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gated_sae import SAEModel
from hf_gated_sae.formats import formats


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_folds_are_not_rounded_to_the_stored_dtype(half: torch.dtype, tmp_path: Path) -> None:
    example = formats["llama_scope"].examples(tmp_path)[0]
    folder = tmp_path / example.repo / example.address
    [weights] = folder.rglob("*.safetensors")
    stored = {name: tensor.to(half) for name, tensor in load_file(weights).items()}
    save_file(stored, weights)
    wide = SAEModel.from_pretrained(folder, dtype=torch.float32)
    save_file({name: tensor.float() for name, tensor in stored.items()}, weights)
    exact = SAEModel.from_pretrained(folder)
    assert wide.dtype == exact.dtype == torch.float32
    for name, tensor in exact.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name]), name


def test_a_narrower_dtype_is_applied_after_it(tmp_path: Path) -> None:
    example = formats["llama_scope"].examples(tmp_path)[0]
    folder = tmp_path / example.repo / example.address
    narrow = SAEModel.from_pretrained(folder, dtype="bfloat16")
    exact = SAEModel.from_pretrained(folder).float()
    assert torch.equal(narrow.W_dec, exact.W_dec.bfloat16()) and narrow.threshold.dtype == torch.float32
