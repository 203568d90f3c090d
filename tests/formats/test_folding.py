"""Folding changes units and nothing else: every function is compared with the original SAE, in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.formats import _folding
from hf_gated_sae.modeling import SAEModel
from tests.support.example_saes import build, randomised

SHARED = {"b_dec", "W_skip"}
POSITIVELY_HOMOGENEOUS = ("gated", "glu", "jumprelu", "standard")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}

FACTORS = st.floats(1e-3, 1e3)
SAES: dict[str, st.SearchStrategy[Any]] = {
    "architecture": st.sampled_from(POSITIVELY_HOMOGENEOUS),
    "seed": st.integers(0, 2**20),
    "d_in": st.integers(1, 7),
    "d_sae": st.integers(1, 20),
}
many = settings(max_examples=30, deadline=None)


def trained(architecture: str, seed: int, **widths: Any) -> SAEModel:
    """An SAE with decoder rows of norms from about 0.1 to 2."""
    torch.manual_seed(seed)
    sae = randomised(build(architecture, **widths), seed).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(len(sae.W_dec), 1, dtype=torch.float64) + 0.1)
    return sae


def tensors_of(sae: SAEModel) -> dict[str, torch.Tensor]:
    statistics = ("max_activation", "mean_activation")
    return {name: tensor.clone() for name, tensor in sae.state_dict().items() if name not in statistics}


def with_tensors(sae: SAEModel, tensors: dict[str, torch.Tensor]) -> SAEModel:
    """A copy of an SAE with other weights."""
    other = type(sae)(sae.config).double()
    other.load_state_dict({**sae.state_dict(), **tensors})
    return other


def inputs(sae: SAEModel) -> torch.Tensor:
    return torch.randn(11, sae.config.d_in, dtype=torch.float64)


@many
@given(scale=FACTORS, **SAES)
def test_an_input_scale_moves_into_the_weights(scale: float, **sae_arguments: Any) -> None:
    """``folded(x) == trained(scale * x) / scale``, and the latents are those of training."""
    sae = trained(**sae_arguments)
    folded, x = with_tensors(sae, _folding.fold_input_scale(tensors_of(sae), scale)), inputs(sae)
    torch.testing.assert_close(folded(x).latents, sae(scale * x).latents, **TIGHT)
    torch.testing.assert_close(folded(x).reconstruction, sae(scale * x).reconstruction / scale, **TIGHT)


@many
@given(scale_in=FACTORS, scale_out=FACTORS, **SAES)
def test_a_transcoder_has_two_scales(scale_in: float, scale_out: float, **sae_arguments: Any) -> None:
    sae = trained(**sae_arguments, d_out=5, apply_b_dec_to_input=False, skip_connection=True)
    folded = with_tensors(sae, _folding.fold(tensors_of(sae), scale_in=scale_in, scale_out=scale_out))
    x = inputs(sae)
    torch.testing.assert_close(folded(x).latents, sae(scale_in * x).latents, **TIGHT)
    torch.testing.assert_close(folded(x).reconstruction, sae(scale_in * x).reconstruction / scale_out, **TIGHT)


@many
@given(**SAES)
def test_decoder_norms_move_into_the_latents(**sae_arguments: Any) -> None:
    """The output is unchanged; each latent is multiplied by the norm of its decoder row."""
    sae = trained(**sae_arguments)
    norms, x = sae.W_dec.norm(dim=1), inputs(sae)
    folded = with_tensors(sae, _folding.fold_decoder_norms(tensors_of(sae)))
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones_like(norms), **TIGHT)
    torch.testing.assert_close(folded(x).latents, sae(x).latents * norms, **TIGHT)
    torch.testing.assert_close(folded(x).reconstruction, sae(x).reconstruction, **TIGHT)


@many
@given(scale=FACTORS, **SAES)
def test_one_fold_equals_two_in_turn(scale: float, **sae_arguments: Any) -> None:
    sae = trained(**sae_arguments)
    unit = torch.rand(sae.config.d_sae, dtype=torch.float64) + 0.5
    at_once = _folding.fold(tensors_of(sae), scale_in=scale, latent_unit=unit)
    in_turn = _folding.fold_decoder_norms(_folding.fold_input_scale(tensors_of(sae), scale), unit)
    for name, tensor in at_once.items():
        torch.testing.assert_close(tensor, in_turn[name], **TIGHT)


@many
@given(seed=st.integers(0, 2**20), d_sae=st.integers(1, 20))
def test_a_gate_on_what_is_written_becomes_a_gate_on_the_latents(seed: int, d_sae: int) -> None:
    sae = trained("jumprelu", seed, d_sae=d_sae)
    x, norms = inputs(sae), sae.W_dec.norm(dim=1)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = torch.where(pre * norms > sae.threshold, pre, 0.0).relu()
    folded = with_tensors(sae, _folding.gate_by_decoder_norms(tensors_of(sae)))
    torch.testing.assert_close(folded.encode(x), wanted, **TIGHT)


FOLDS = {
    "input": lambda tensors: _folding.fold_input_scale(tensors, 0.37),
    "output": lambda tensors: _folding.fold(tensors, scale_in=3.1, scale_out=0.2),
    "norms": _folding.fold_decoder_norms,
    "gate": lambda tensors: _folding.gate_by_decoder_norms(tensors) if "threshold" in tensors else tensors,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fold", list(FOLDS))
@pytest.mark.parametrize("architecture", POSITIVELY_HOMOGENEOUS)
def test_a_slice_of_the_fold_is_the_fold_of_the_slice(architecture: str, fold: str, dtype: torch.dtype) -> None:
    """Dtypes and shapes are also right, including on the meta device."""
    sae = trained(architecture, 3, d_sae=33, d_out=6, skip_connection=True)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(sae).items()}
    tensors["W_dec"] = tensors["W_dec"].T.contiguous().T  # strided as in files of linear layers
    rows = [31, 2, 17, 2]
    sliced = {name: tensor.clone() if name in SHARED else tensor[rows] for name, tensor in tensors.items()}
    described = {name: tensor.to("meta") for name, tensor in tensors.items()}
    whole = FOLDS[fold](tensors)
    part, shapes = FOLDS[fold](sliced), FOLDS[fold](described)
    for name, tensor in whole.items():
        assert torch.equal(tensor if name in SHARED else tensor[rows], part[name]), name
        assert tensor.dtype == shapes[name].dtype == dtype and tensor.shape == shapes[name].shape, name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    matrix = torch.randn(64, 48).to(dtype)
    matrix = matrix.T if transposed else matrix
    exact = {"W_enc_T": matrix.double(), "W_dec": matrix.double(), "b_dec": torch.zeros(matrix.shape[1])}
    exact = _folding.fold(exact, scale_in=0.3, latent_unit=_folding.decoder_norms(matrix.double()))
    half = {"W_enc_T": matrix.clone(), "W_dec": matrix.clone(), "b_dec": torch.zeros(matrix.shape[1], dtype=dtype)}
    half = _folding.fold(half, scale_in=0.3, latent_unit=_folding.decoder_norms(matrix))
    for name in ("W_enc_T", "W_dec"):
        error = (half[name].double() - exact[name]).abs() / exact[name].abs()
        assert error.max() <= torch.finfo(dtype).eps / 2 * 1.001


def test_a_latent_that_writes_nothing_is_off() -> None:
    sae = trained("jumprelu", 0, d_sae=4)
    with torch.no_grad():
        sae.W_dec[2] = 0
        sae.b_enc[2] = 100.0
    x = inputs(sae)
    for fold in (_folding.fold_decoder_norms, _folding.gate_by_decoder_norms):
        tensors = fold(tensors_of(sae))
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert not with_tensors(sae, tensors).encode(x)[:, 2].any()


PROGRAM = """
import resource, runpy, sys, torch
folding = runpy.run_path(sys.argv[2])  # alone, without the package: it needs nothing but torch
fold, fold_decoder_norms, gate = (folding[name] for name in ("fold", "fold_decoder_norms", "gate_by_decoder_norms"))
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def tensors(n, d):
    made = {"W_enc_T": torch.ones(n, d, dtype=dtype), "W_dec": torch.ones(d, n, dtype=dtype).T}
    made |= {"b_dec": torch.ones(d, dtype=dtype), "b_enc": torch.ones(n, dtype=dtype)}
    return {**made, "threshold": torch.ones(n)}
def folded(made):
    gate(fold_decoder_norms(fold(made, scale_in=2.0, scale_out=3.0)))
folded(tensors(512, 512))
made = tensors(16384, 1024)
before = peak()
folded(made)
print((peak() - before) / made["W_dec"].nbytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_matrix_is_copied_in_memory(dtype: str) -> None:
    """Measured as the process's peak, which includes copies that torch makes inside in-place operations."""
    command = [sys.executable, "-c", PROGRAM, dtype, _folding.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.5
