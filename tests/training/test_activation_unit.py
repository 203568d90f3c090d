from __future__ import annotations

import pytest
import torch

from hf_gated_sae.errors import InputError
from hf_gated_sae.training.activation_unit import carries_unit, change_unit

from .worlds import build


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("factor", [0.07, 13.0])
def test_a_folded_scale_computes_the_same_function(architecture, factor, centred):
    sae = build(architecture, randomise=True, apply_b_dec_to_input=centred).double()
    x = torch.randn(200, 8, dtype=torch.float64)
    before = sae(factor * x)
    if not sae.homogeneous:
        with pytest.raises(InputError, match="activation_scale='none'"):
            change_unit(sae, 1 / factor)
        return
    change_unit(sae, 1 / factor)
    after = sae(x)
    assert (before.latents > 0).any()
    torch.testing.assert_close(after.reconstruction, before.reconstruction / factor)
    torch.testing.assert_close(after.latents, before.latents / factor)
    torch.testing.assert_close(after.latents > 0, before.latents > 0)


def test_a_folded_scale_leaves_directions_alone(architecture):
    sae = build(architecture, randomise=True)
    kept = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    if not sae.homogeneous:
        pytest.skip("the unit of its activations cannot be changed")
    change_unit(sae, 4.0)
    for name, tensor in sae.state_dict().items():
        expected = kept[name] if name.startswith(("W_", "r_")) else 4 * kept[name]
        assert torch.equal(tensor, expected), name


def test_every_registered_tensor_has_a_known_unit(architecture):
    for name in build(architecture).state_dict():
        carries_unit(name)


def test_a_tensor_of_unknown_unit_is_refused_by_name():
    with pytest.raises(InputError, match="'temperature'"):
        carries_unit("temperature")


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_factor_is_refused(factor):
    with pytest.raises(InputError, match="positive"):
        change_unit(build("gated"), factor)
