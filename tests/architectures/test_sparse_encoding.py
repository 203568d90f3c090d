"""Active latents and reconstructions, computed a few tokens at a time, equal the plain equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import LatentIndexError, ShapeError
from hf_gated_sae.functional.cpu import bf16_screening, tiled_projection
from hf_gated_sae.functional.sparse_latents import SparseLatents
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.modeling import sparse_encoding as module
from tests.support.example_saes import D_IN, D_SAE, ONE_SITE, build, example, randomised

every_architecture = pytest.mark.parametrize("architecture", list(architectures))
every_width_of_one = pytest.mark.parametrize("architecture", ONE_SITE)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_TOKENS", 3)
    monkeypatch.setattr(module, "ACTIVATIONS_AT_ONCE", 8 * D_IN)
    monkeypatch.setattr(module, "LATENTS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(tiled_projection, "TILE", 32)


def activations(sae: SAEModel, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, *sae.input_shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def assert_the_same(sae: SAEModel, x: torch.Tensor, **tolerance: float) -> SparseLatents:
    """Compare sparse results with the plain equations; under `no_grad` they are computed in parts."""
    latents, live = sae.encode(x), sae.encode_sparse(x)
    assert live.shape == tuple(latents.shape)
    torch.testing.assert_close(live.dense(), latents, **tolerance)
    assert torch.equal(live.l0, (latents != 0).sum(-1))
    assert torch.equal(live.dense() != 0, latents != 0)
    if sae.config.kept_latents is None:
        reconstruction = sae(x).reconstruction
        torch.testing.assert_close(sae.decode(live, x), reconstruction, **tolerance)
        torch.testing.assert_close(sae.reconstruct(x), reconstruction, **tolerance)
    return live


@every_architecture
@pytest.mark.parametrize("shape", [(1,), (25,), (2, 3), (2, 1, 9), (0,), (2, 0)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_equal_to_the_plain_equations(architecture: str, shape: tuple[int, ...], mode: Any) -> None:
    sae = example(architecture).double()
    with mode():
        assert_the_same(sae, activations(sae, *shape), **TIGHT)


@every_width_of_one
@torch.no_grad()
def test_a_single_vector(architecture: str) -> None:
    sae = example(architecture).double()
    if sae.per_token:
        assert_the_same(sae, activations(sae), **TIGHT)


@every_architecture
@pytest.mark.parametrize("settings", [{"normalization": "layer_norm"}, {"normalization": "rms_norm"}])
@torch.no_grad()
def test_normalised_tokens(architecture: str, settings: dict[str, Any]) -> None:
    sae = example(architecture, **settings).double()
    assert_the_same(sae, activations(sae, 4, 5), **TIGHT)


@pytest.mark.parametrize("architecture", ["gated", "topk"])
@torch.no_grad()
def test_a_skip_transcoder(architecture: str) -> None:
    settings = {"site": "mlp_in.1", "site_out": "mlp_out.1", "apply_b_dec_to_input": False, "d_out": 4}
    sae = example(architecture, skip_connection=True, normalization="unit_norm", **settings).double()
    assert_the_same(sae, activations(sae, 11), **TIGHT)


@pytest.mark.parametrize("settings", [{"rectified": False}, {"rank_by_decoder_norm": True}, {"k": D_SAE}])
@torch.no_grad()
def test_topk_options(settings: dict[str, Any]) -> None:
    sae = example("topk", **settings).double()
    assert_the_same(sae, activations(sae, 9), **TIGHT)


@every_architecture
@pytest.mark.parametrize("shift", [-1e3, 1e3])
@torch.no_grad()
def test_all_off_and_all_on(architecture: str, shift: float) -> None:
    sae = example(architecture).double()
    for name, tensor in sae.named_parameters():
        if name in ("b_enc", "b_gate", "b_mag"):
            tensor += shift
    live = assert_the_same(sae, activations(sae, 10), rtol=1e-11, atol=1e-11)
    if architecture in ("gated", "jumprelu", "standard"):
        assert len(live.indices) == (10 * D_SAE if shift > 0 else 0)


@every_width_of_one
@torch.no_grad()
def test_nan_stays_visible(architecture: str) -> None:
    sae = example(architecture).double()
    x = activations(sae, 12)
    x[5, 2] = float("nan")
    output = sae(x)
    assert sae.reconstruct(x)[5].isnan().all() == output.reconstruction[5].isnan().all()
    assert torch.equal(sae.encode_sparse(x).dense().isnan(), output.latents.isnan())
    if sae.per_token:
        assert not sae.reconstruct(x)[[0, 4, 6, 11]].isnan().any()


@every_width_of_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes(architecture: str, dtype: torch.dtype) -> None:
    sae = example(architecture).to(dtype)
    x = activations(sae, 6, 10, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    live = sae.encode_sparse(x)
    assert live.values.dtype == dtype
    torch.testing.assert_close(live.dense(), sae.encode(x), **tolerance)
    torch.testing.assert_close(sae.reconstruct(x), sae(x).reconstruction, **tolerance)


@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "batch_topk", "tanh_relu"])
@torch.no_grad()
def test_screened_latents_are_the_plain_ones(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with float64; latents within rounding of zero may be on or off."""
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", True)  # a CPU without bfloat16 only takes longer
    monkeypatch.setattr(bf16_screening, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(bf16_screening, "DENSEST", 1.0)
    monkeypatch.setattr(module, "ACTIVATIONS_AT_ONCE", 1 << 20)
    sae = randomised(build(architecture, d_in=48, d_sae=200))
    x = torch.randn(120, 48, generator=torch.Generator().manual_seed(0))
    found = sae.encode_sparse(x).dense()
    reconstruction = sae.reconstruct(x)
    output = sae.double()(x.double())
    torch.testing.assert_close(found.double(), output.latents, rtol=1e-5, atol=1e-5)
    sure = (output.latents > 1e-5) | (output.latents == 0)
    torch.testing.assert_close(reconstruction.double(), output.reconstruction, rtol=1e-4, atol=1e-4)
    assert ((found != 0) == (output.latents != 0))[sure].float().mean() > 0.999


@torch.no_grad()
def test_weights_of_any_strides() -> None:
    sae = example("gated").double()
    plain = assert_the_same(sae, activations(sae, 10), **TIGHT)
    for name in ("W_enc_T", "W_dec"):
        parameter = getattr(sae, name)
        parameter.data = parameter.data.T.contiguous().T
    assert not sae.W_dec.is_contiguous()
    assert torch.equal(assert_the_same(sae, activations(sae, 10), **TIGHT).indices, plain.indices)


@every_architecture
def test_gradients_are_those_of_the_plain_equations(architecture: str) -> None:
    sae = example(architecture).double()
    x = activations(sae, 7).requires_grad_()
    parameters = [x, *sae.parameters()]

    def gradients(reconstruction: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(reconstruction.square().sum(), parameters, allow_unused=True))

    wanted = gradients(sae(x).reconstruction)
    for found in (gradients(sae.reconstruct(x)), gradients(sae.decode(sae.encode_sparse(x), x))):
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
@torch.no_grad()
def test_a_partly_loaded_sae_finds_its_own_latents(architecture: str) -> None:
    sae = build(architecture, kept_latents=[3, 9, 1])
    randomised(sae.double())
    live = assert_the_same(sae, activations(sae, 9), **TIGHT)
    assert live.shape == (9, 3)
    with pytest.raises(LatentIndexError, match="Only 3 of 16 latents were loaded"):
        sae.reconstruct(activations(sae, 9))


@every_architecture
def test_wrong_widths_are_refused(architecture: str) -> None:
    sae = example(architecture)
    for call in (sae.encode_sparse, sae.reconstruct):
        with pytest.raises(ShapeError, match=r"\[2, 5\]"):
            call(torch.zeros(2, 5))


@torch.no_grad()
def test_an_overridden_encode_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inherited cut does not apply to an overridden `_encode`."""
    sae = example("standard").double()

    def encode(self: SAEModel, x: torch.Tensor, latents: torch.Tensor | None) -> torch.Tensor:
        return self._project(x, latents).abs() + 1

    monkeypatch.setattr(type(sae), "_encode", encode, raising=False)
    assert_the_same(sae, activations(sae, 10), **TIGHT)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@every_width_of_one
@torch.no_grad()
def test_dense_latents_of_all_tokens_are_never_allocated(architecture: str) -> None:
    sae = build(architecture)
    if not sae.per_token:
        pytest.skip("encoded by whole sequences")
    for name, tensor in sae.named_parameters():
        if name in ("b_enc", "b_gate", "b_mag"):
            tensor -= 1.5
    x = activations(sae, 300, dtype=torch.float32)
    for call in (sae.encode_sparse, sae.reconstruct):
        with Largest() as seen:
            call(x)
        assert seen.numbers < 300 * D_SAE
    with Largest() as seen:
        sae(x)
    assert seen.numbers >= 300 * D_SAE
