"""SAEs that are loaded in inference mode can be trained and changed later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gated_sae import SAEModel, SAESet
from hf_gated_sae.formats import formats
from tests.support.example_saes import assert_same, example


def assert_ordinary(sae: SAEModel) -> None:
    assert not any(tensor.is_inference() for tensor in sae.state_dict().values())
    assert all(parameter.requires_grad for parameter in sae.parameters())
    x = torch.randn(8, sae.config.d_in, dtype=sae.dtype)
    sae.training_loss(x, sparsity_coefficient=0.1).total.backward()
    torch.optim.SGD(sae.parameters(), lr=0.1).step()
    with torch.no_grad():
        sae.W_dec.mul_(2)
        sae.max_activation.fill_(1)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"device_map": "cpu"}])
def test_our_own_layout(options: dict[str, Any], tmp_path: Path) -> None:
    example("gated").save_pretrained(tmp_path)
    with torch.inference_mode():
        sae = SAEModel.from_pretrained(tmp_path, **options)
        assert torch.is_inference_mode_enabled()
        some = SAEModel.from_pretrained(tmp_path, latents=[3])
    assert_same(sae, SAEModel.from_pretrained(tmp_path, **options))
    assert_ordinary(sae)
    some.W_dec.data.mul_(2)


@pytest.mark.parametrize("layout", ["sparsify", "gemma_scope", "dictionary_learning"])
def test_other_layouts(layout: str, tmp_path: Path) -> None:
    [first, *_] = formats[layout].examples(tmp_path)
    with torch.inference_mode():
        sae = SAEModel.from_pretrained(tmp_path / first.repo, first.address)
        member = SAESet.from_pretrained(tmp_path / first.repo)[first.address]
    for each in (sae, member):
        assert_ordinary(each.train())


def test_tensors_that_are_given(tmp_path: Path) -> None:
    original = example("standard")
    with torch.inference_mode():
        held = {name: tensor + 0 for name, tensor in original.state_dict().items()}
        assert held["W_dec"].is_inference()
        sae = SAEModel.from_pretrained(None, config=original.config, state_dict=held)
        described = SAEModel.from_pretrained(None, architecture="standard", state_dict=held)
    later = SAEModel.from_pretrained(None, config=original.config, state_dict=held)
    for each in (sae, described, later):
        assert torch.equal(each.W_dec, original.W_dec)
        assert_ordinary(each)
