"""Activations and SAE of different dtypes: results are computed as if the SAE had been cast to the promoted dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gated_sae.architectures import architectures
from hf_gated_sae.functional.sparse_latents import SparseLatents
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.modeling.dtypes import EQUATIONS
from tests.support.example_saes import D_SAE, example

CASES = {
    "float32 into bfloat16": (torch.float32, torch.bfloat16, torch.float32),
    "float64 into float32": (torch.float64, torch.float32, torch.float64),
    "bfloat16 into float32": (torch.bfloat16, torch.float32, torch.float32),
    "float16 into bfloat16": (torch.float16, torch.bfloat16, torch.float32),
}
CHOSEN = [0, 3, 5]

every_case = pytest.mark.parametrize("case", CASES)
every_architecture = pytest.mark.parametrize("architecture", sorted(architectures))


def given_to(sae: SAEModel, dtype: torch.dtype) -> torch.Tensor:
    shape = (3, 4, *sae.input_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def everything(sae: SAEModel, x: torch.Tensor, latents: torch.Tensor) -> dict[str, Any]:
    """Return all results of the SAE for activations and latents, by name."""
    source = x if sae.one_site else x[..., 0, :].contiguous()
    of_source = sae.encode_source(source, 0)
    found: dict[str, Any] = {
        "encode": sae.encode(x),
        "some": sae.encode(x, CHOSEN),
        "keyword": sae.encode(x=x),
        "forward": sae(x).reconstruction,
        "reconstruct": sae.reconstruct(x),
        "encode_sparse": sae.encode_sparse(x).dense(),
        "decode": sae.decode(latents, x),
        "decode of sparse latents": sae.decode(SparseLatents.from_dense(latents), x),
        "encode_source": of_source,
        "decode_at": sae.decode_at([of_source], 0, source),
        "constant": sae.constant(x),
    }
    if sae.config.architecture != "temporal":  # cannot be trained
        loss = sae.training_loss(x, sparsity_coefficient=0.5)
        found |= {"loss": loss.total, "training reconstruction": loss.reconstruction}
    return found


@every_case
@every_architecture
def test_results_are_those_of_the_cast_sae(architecture: str, case: str) -> None:
    given, own, wide = CASES[case]
    sae = example(architecture).to(own)
    cast = copy.deepcopy(sae).to(wide)
    x = given_to(sae, given)
    latents = cast.encode(x.to(wide)).detach()
    with torch.no_grad():
        found, expected = everything(sae, x, latents), everything(cast, x.to(wide), latents)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == wide, name
        assert torch.equal(value, expected[name]), name
    assert sae.dtype == own and all(each.dtype == own for each in sae.parameters())


@pytest.mark.parametrize("normalization", ["center", "layer_norm", "unit_norm", "rms_norm", "standardize"])
def test_normalisation_and_skip_connections(normalization: str) -> None:
    for settings in ({}, {"skip_connection": True, "site": "mlp_in.1", "site_out": "mlp_out.1"}):
        sae = example("gated", normalization=normalization, **settings).bfloat16()
        x = given_to(sae, torch.float32)
        with torch.no_grad():
            found, expected = sae(x), copy.deepcopy(sae).float()(x)
        assert torch.equal(found.reconstruction, expected.reconstruction)
        assert torch.equal(found.latents, expected.latents)


@every_architecture
def test_gradients_reach_weights_and_activations(architecture: str) -> None:
    sae = example(architecture).bfloat16()
    cast = copy.deepcopy(sae).float()
    x, same = (given_to(sae, torch.float32).requires_grad_() for _ in range(2))
    sae(x).reconstruction.square().sum().backward()
    cast(same).reconstruction.square().sum().backward()
    assert torch.equal(x.grad, same.grad)
    for (name, mine), theirs in zip(sae.named_parameters(), cast.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert mine.grad.dtype == torch.bfloat16
            torch.testing.assert_close(mine.grad.float(), theirs.grad, rtol=1e-2, atol=1e-5)


def test_the_running_threshold_is_updated() -> None:
    sae = example("batch_topk", k=4).bfloat16().train()
    cast = copy.deepcopy(sae).float()
    before, x = sae.threshold.clone(), given_to(sae, torch.float32)
    sae.training_loss(x)
    cast.training_loss(x)
    assert not torch.equal(cast.threshold, before.float())
    assert torch.equal(sae.threshold, cast.threshold.bfloat16())


def test_function_transforms_work() -> None:
    sae = example("gated").bfloat16()
    cast, x = copy.deepcopy(sae).float(), given_to(sae, torch.float32).reshape(12, -1)
    for transformed in (
        lambda each: torch.func.vmap(each.encode)(x),
        lambda each: torch.func.grad(lambda row: each(row).reconstruction.sum())(x[0]),
        lambda each: torch.func.jvp(each.encode, (x,), (torch.ones_like(x),))[1],
    ):
        assert torch.equal(transformed(sae), transformed(cast))


@every_architecture
def test_nothing_is_cast_where_the_dtypes_agree(architecture: str) -> None:
    sae, casts = example(architecture), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32:
                casts.append(args)
            return function(*args, **(kwargs or {}))

    x = given_to(sae, torch.float32)
    with torch.no_grad(), Watch():
        sae(x)
    assert casts == []


def test_autocast_takes_precedence() -> None:
    sae = example("gated")
    x = given_to(sae, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.encode(x), type(sae).encode.__wrapped__(sae, x))


def test_a_third_party_encode_is_promoted_without_code_for_it() -> None:
    class Halved(architectures["gated"]):  # type: ignore[misc,name-defined]
        def encode(self, x: torch.Tensor, latents: Any = None) -> torch.Tensor:
            """Return half of the usual latents."""
            return super().encode(x, latents) / 2

    sae = Halved(architectures["gated"].config_class(d_in=6, d_sae=D_SAE)).bfloat16()
    x = given_to(sae, torch.float32)
    assert torch.equal(sae.encode(x), copy.deepcopy(sae).float().encode(x))


def test_every_name_in_equations_exists() -> None:
    defined = {name for cls in (SAEModel, *architectures.values()) for name in EQUATIONS if hasattr(cls, name)}
    assert defined == EQUATIONS
