"""Each architecture against plain numpy in float64, written from the papers' equations and not from our code.

The equations are in `references`, one file per architecture.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_gated_sae.architectures as package
from hf_gated_sae import GatedSAE, GatedSAEConfig
from hf_gated_sae.architectures import architectures
from hf_gated_sae.architectures.gated_untied import UntiedGatedSAE
from hf_gated_sae.errors import InputError
from hf_gated_sae.functional.normalization import NORMALIZATIONS
from hf_gated_sae.modeling import SAEModel
from tests.architectures import references
from tests.support.example_saes import build, randomised

Array = np.ndarray[Any, np.dtype[np.float64]]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
ARCHITECTURES = [module.name for module in pkgutil.iter_modules(package.__path__)]
"""The files of the package; architectures of other packages bring their own tests."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def reference_of(architecture: str) -> ModuleType:
    """Return the module of an architecture's reference; the test fails if there is none."""
    name = f"{references.__name__}.{architecture}"
    if importlib.util.find_spec(name) is None:
        pytest.fail(
            f"The architecture {architecture!r} has no reference to compare with: write "
            f"tests/architectures/references/{architecture}.py as described in the __init__.py beside it."
        )
    return importlib.import_module(name)


def numpy_parameters(sae: SAEModel) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}


def built(architecture: str, random: Random, d_sae: int, **common: Any) -> SAEModel:
    """Return an SAE with common settings, overridden by those of its architecture."""
    own = getattr(reference_of(architecture), "settings", lambda random, d_sae: {})(random, d_sae)
    common = {
        **{"k": random.randint(1, d_sae), "d_out": random.choice([None, None, 1, 9])},
        **({"site": "mlp_in.1", "site_out": "mlp_out.1"} if random.random() < 0.5 else {}),
        **{"skip_connection": random.random() < 0.5, "apply_b_dec_to_input": random.random() < 0.5},
        **common,
        **own,
    }
    if common["d_out"] not in (None, common["d_in"]):
        common["apply_b_dec_to_input"] = False  # the decoder bias has another width
    return randomised(build(architecture, d_sae=d_sae, **common), random.randrange(1 << 20)).double()


def drawn(shape: tuple[int, ...], random: Random) -> Array:
    return random.choice([1e-3, 1.0, 1e3]) * np.random.default_rng(random.randrange(1 << 20)).normal(size=shape)


@every_architecture
def test_encode_and_decode_are_the_equations(architecture: str) -> None:
    """With every normalisation of tokens, with and without a skip connection."""
    reference = reference_of(architecture)
    for seed in range(120):
        random, normalization = Random(seed), ["none", *NORMALIZATIONS][seed % (1 + len(NORMALIZATIONS))]
        d_in = random.randint(1 if normalization == "none" else 2, 9)
        sae = built(architecture, random, random.randint(1, 24), d_in=d_in, normalization=normalization)
        x = drawn((random.randint(0 if normalization == "none" else 1, 5), *sae.input_shape), random)
        parameters, config = numpy_parameters(sae), sae.config
        shift, divisor, scale = references.normalization(x, config)
        read = (x - shift) / divisor
        latents = reference.encode(read, parameters, config)
        written = getattr(reference, "decode", references.decode)(latents, read, parameters, config)
        if config.sites_read == config.sites_written:
            written = written * scale + shift
        with torch.no_grad():
            output = sae(torch.from_numpy(x))
        case = {**TIGHT, "err_msg": f"seed {seed}: {config}"}
        np.testing.assert_allclose(output.latents.numpy(), latents, **case)
        np.testing.assert_allclose(output.reconstruction.numpy(), written, **case)


@every_architecture
def test_the_training_objective_is_the_equations(architecture: str) -> None:
    """Every variant, term by term; training is refused where the reference returns None."""
    reference, objective_class = reference_of(architecture), architectures[architecture].objective_class
    variants = getattr(reference, "VARIANTS", [{}])
    for seed in range(20 * len(variants)):
        random, variant = Random(seed), variants[seed % len(variants)]
        sae = built(architecture, random, random.randint(12, 24), d_in=random.randint(1, 9))
        x = drawn((random.randint(1, 5), *sae.input_shape), random)
        target = drawn((len(x), *sae.b_dec.shape), random)
        power = random.choice([1.0, 0.5]) if objective_class.anneals else 1.0
        wanted = reference.objective(
            x, target, numpy_parameters(sae), sae.config, coefficient=0.7, power=power, **variant
        )
        arguments: dict[str, Any] = {
            **{"target": torch.from_numpy(target), "objective": objective_class(**variant)},
            **{"sparsity_coefficient": 0.7, "sparsity_power": power},
        }
        if wanted is None:
            with pytest.raises(InputError, match=r"cannot be trained here|is not supported yet"):
                sae.training_loss(torch.from_numpy(x), **arguments)
            continue
        loss = sae.training_loss(torch.from_numpy(x), **arguments)
        found = {name: term.item() for name, term in loss.terms.items()}
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12), f"seed {seed}: {variant}, {sae.config}"
        assert loss.total.item() == pytest.approx(sum(wanted.values()), rel=1e-9, abs=1e-12)


@every_architecture
def test_the_variants_of_a_reference_set_every_field_of_the_objective(architecture: str) -> None:
    fields = {field.name for field in dataclasses.fields(architectures[architecture].objective_class)}
    missing = fields - {name for variant in getattr(reference_of(architecture), "VARIANTS", [{}]) for name in variant}
    assert not missing, f"name {sorted(missing)} in VARIANTS of tests/architectures/references/{architecture}.py"


def test_architectures_and_references_are_named_like_their_files() -> None:
    ours = {name for name, each in architectures.items() if each.__module__.startswith(f"{package.__name__}.")}
    assert ours == set(ARCHITECTURES) == {module.name for module in pkgutil.iter_modules(references.__path__)}


def test_an_architecture_without_a_reference_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"write tests/architectures/references/no_such\.py"):
        reference_of("no_such")


def test_comparisons_are_strict() -> None:
    """A pre-latent exactly at its threshold, and a gate exactly at zero, are off."""
    for name, off in {"jumprelu": "threshold", "batch_topk": "threshold", "standard": None, "gated": None}.items():
        sae = build(name, d_in=1, d_sae=1, k=1).double()
        with torch.no_grad():
            for tensor in sae.state_dict().values():
                tensor.zero_()
            sae.W_enc_T.fill_(1.0)
            if off:
                sae.state_dict()[off].fill_(2.0)
            if name == "gated":
                sae.b_gate.fill_(-2.0)  # the magnitude is 2 where the gate is zero
        at = 2.0 if name != "standard" else 0.0
        x = torch.tensor([[at], [np.nextafter(at, 9.0)]], dtype=torch.float64)
        assert (sae.encode(x) != 0).tolist() == [[False], [True]], name


def test_topk_keeps_fewer_where_fewer_are_positive() -> None:
    sae = build("topk", d_in=2, d_sae=5, k=4).double()
    with torch.no_grad():
        for tensor in (sae.W_enc_T, sae.b_dec):
            tensor.zero_()
        sae.b_enc.copy_(torch.tensor([3.0, -1.0, 2.0, -5.0, 0.0]))
    assert sae.encode(torch.zeros(1, 2, dtype=torch.float64)).tolist() == [[3.0, 0.0, 2.0, 0.0, 0.0]]


def test_batch_topk_trains_on_the_largest_of_the_batch() -> None:
    """``k * tokens`` latents are kept in the whole batch; the threshold follows the smallest of them."""
    sae = randomised(build("batch_topk", d_in=4, d_sae=12, k=2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    z = reference_of("standard").encode(x.numpy(), numpy_parameters(sae), sae.config)
    kept = np.sort(z[z > 0])[::-1][:12]
    before = sae.threshold.item()
    latents = sae.training_loss(x).latents.detach().numpy()
    np.testing.assert_allclose(latents, np.where(z >= kept[-1], z, 0.0), **TIGHT)
    momentum = sae.config.threshold_momentum
    assert sae.threshold.item() == pytest.approx(momentum * before + (1 - momentum) * kept[-1])


def test_changing_a_latent_of_a_temporal_sae_adds_its_decoder_row() -> None:
    sae = randomised(build("temporal", d_in=5, d_sae=12, scaling_factor=0.03)).double()
    x = 100 * torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        output = sae(x)
        one = torch.zeros_like(output.latents)
        one[..., 4] = 1.0
        moved = sae.decode(output.latents + one, x) - output.reconstruction
        torch.testing.assert_close(moved, sae.W_dec[4] * sae.written_scale(x))


@pytest.mark.parametrize("rule", ["threshold", "steps", "support"])
def test_matching_pursuit_stops(rule: str) -> None:
    """Each rule on its own, on orthonormal rows where the pursuit can be followed by hand."""
    off = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
    on = {
        "threshold": {"residual_threshold": 1.2},  # the residual after 5, 2 and 1 has norm 1
        "steps": {"max_iterations": 2},
        "support": {"stop_on_duplicate_support": True},
    }[rule]
    sae = build("matching_pursuit", d_in=4, d_sae=4, **{**off, **on}).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4))
        sae.b_dec.zero_()
    latents = sae.encode(torch.tensor([[5.0, 2.0, 1.0, 1.0]], dtype=torch.float64))
    wanted = {"threshold": [5.0, 2.0, 1.0, 0.0], "steps": [5.0, 2.0, 0.0, 0.0], "support": [5.0, 2.0, 1.0, 1.0]}[rule]
    assert latents.tolist() == [wanted]


# ---------------------------------------------------------------- conversions


def gated_sae(seed: int, *, dtype: torch.dtype = torch.float32, d_in: int = 5, d_sae: int = 40) -> GatedSAE:
    sae: Any = randomised(build("gated", d_in=d_in, d_sae=d_sae), seed)
    return sae.to(dtype)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), centred=st.booleans())
def test_gated_to_jumprelu_and_back_computes_the_same(seed: int, centred: bool) -> None:
    """In float64 only the order of sums and products can differ, also where theta is negative."""
    sae: Any = randomised(build("gated", d_in=5, d_sae=40, apply_b_dec_to_input=centred), seed).double()
    theta = sae.b_mag - sae.r_mag.exp() * sae.b_gate
    assert (theta < 0).any() and (theta > 0).any()
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    jump = sae.to_jumprelu()
    back = GatedSAE.from_jumprelu(jump)
    assert (jump.threshold >= 0).all() and jump.config.apply_b_dec_to_input == centred
    with torch.no_grad():
        for other in (jump, back):
            assert torch.equal(other.encode(x) != 0, sae.encode(x) != 0)
            torch.testing.assert_close(other.encode(x), sae.encode(x), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(other(x).reconstruction, sae(x).reconstruction, rtol=1e-12, atol=1e-12)


def test_conversion_is_exact_where_arithmetic_is() -> None:
    """With r_mag = 0 and small whole numbers nothing is rounded, so results are equal in float32."""
    sae = gated_sae(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
        sae.r_mag.zero_()
    x = torch.randint(-8, 9, (500, 5)).float()
    with torch.no_grad():
        latents = sae.encode(x)
        assert torch.equal(latents, sae.to_jumprelu().encode(x))
        assert torch.equal(latents, GatedSAE.from_jumprelu(sae.to_jumprelu()).encode(x))
    assert 0.05 < (latents > 0).float().mean() < 0.95


def test_conversion_in_float32_differs_by_rounding_only() -> None:
    sae = gated_sae(1)
    x = torch.randn(2000, 5)
    with torch.no_grad():
        left, right = sae.encode(x), sae.to_jumprelu().encode(x)
    both = (left > 0) == (right > 0)
    assert both.float().mean() > 0.9999  # within rounding of the threshold, on and off are both right
    torch.testing.assert_close(left[both], right[both], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_conversion_keeps_dtype_site_and_statistics(dtype: torch.dtype) -> None:
    sae = gated_sae(2, dtype=dtype)
    sae.config.site, sae.config.base_model = "resid_post.4", "acme/lm"
    for other in (sae.to_jumprelu(), GatedSAE.from_jumprelu(sae.to_jumprelu())):
        assert other.W_dec.dtype == dtype and other.config.site == "resid_post.4"
        assert other.config.base_model == "acme/lm" and other.W_dec.requires_grad
        assert torch.equal(other.max_activation, sae.max_activation)
        assert torch.equal(other.W_dec, sae.W_dec)


def test_conversion_in_half_precision_rounds_neither_thresholds_nor_statistics(tmp_path: Path) -> None:
    gated_sae(2).save_pretrained(tmp_path)
    sae: Any = SAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    jump = sae.to_jumprelu()
    b_mag, b_gate, r_mag = (each.detach().float() for each in (sae.b_mag, sae.b_gate, sae.r_mag))
    assert jump.threshold.dtype == torch.float32
    assert torch.equal(jump.threshold, torch.relu(b_mag - r_mag.exp() * b_gate))
    assert not torch.equal(jump.threshold, jump.threshold.bfloat16())
    for other in (jump, GatedSAE.from_jumprelu(jump), UntiedGatedSAE.from_gated(sae)):
        assert other.W_dec.dtype == other.W_enc_T.dtype == torch.bfloat16
        for name in ("max_activation", "mean_activation"):
            assert getattr(other, name).dtype == torch.float32
            assert torch.equal(getattr(other, name), getattr(sae, name))
        assert other.threshold.requires_grad if other is jump else other.b_gate.requires_grad


# ---------------------------------------------------------------- the loss


# Which term trains which parameter (arXiv 2404.16014, section 3.2.2): True where there is a gradient, False where it
# is exactly zero. b_dec is reached by sparsity and auxiliary through the centring of the input only.
ROUTING = {
    "W_enc_T": {"reconstruction": True, "sparsity": True, "auxiliary": True},
    "b_gate": {"reconstruction": False, "sparsity": True, "auxiliary": True},
    "r_mag": {"reconstruction": True, "sparsity": False, "auxiliary": False},
    "b_mag": {"reconstruction": True, "sparsity": False, "auxiliary": False},
    "W_dec": {"reconstruction": True, "sparsity": False, "auxiliary": False},
    "b_dec": {"reconstruction": True, "sparsity": True, "auxiliary": True},
}


def gradients(sae: SAEModel, term: str, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradient of one term of the loss; None where a parameter is not part of it."""
    sae.zero_grad(set_to_none=True)
    sae.training_loss(x, sparsity_coefficient=0.5).terms[term].backward()
    return {name: parameter.grad for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("term", ["reconstruction", "sparsity", "auxiliary"])
@pytest.mark.parametrize("parameter", list(ROUTING))
def test_gated_gradients_reach_the_parameters_that_the_paper_states(parameter: str, term: str) -> None:
    sae = gated_sae(4, dtype=torch.float64)
    gradient = gradients(sae, term, torch.randn(50, 5, dtype=torch.float64))[parameter]
    reached = gradient is not None and bool((gradient != 0).any())
    assert reached == ROUTING[parameter][term]


@pytest.mark.parametrize("term", ["sparsity", "auxiliary"])
def test_without_centring_those_terms_do_not_reach_b_dec(term: str) -> None:
    sae: Any = randomised(build("gated", d_in=5, d_sae=40, apply_b_dec_to_input=False), 4).double()
    gradient = gradients(sae, term, torch.randn(50, 5, dtype=torch.float64))["b_dec"]
    assert gradient is None or not gradient.any()


def test_reconstruction_reaches_open_gates_with_a_positive_magnitude_only() -> None:
    sae = gated_sae(5, dtype=torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        live = (sae.encode(x) > 0)[0]
        gate_only = (((x - sae.b_dec) @ sae.W_enc + sae.b_gate) > 0)[0] & ~live
    assert live.any() and gate_only.any() and (~live & ~gate_only).any()
    gradient = gradients(sae, "reconstruction", x)["W_enc_T"]
    assert gradient is not None
    assert torch.equal((gradient != 0).any(-1), live)


def test_auxiliary_gradient_is_that_of_a_frozen_decoder() -> None:
    """Against finite differences in which only the encoder's copy of `b_dec` moves."""
    sae = gated_sae(6, dtype=torch.float64, d_in=3, d_sae=8)
    x = torch.randn(20, 3, dtype=torch.float64)
    p = numpy_parameters(sae)

    def auxiliary(b_dec_of_the_encoder: Array) -> float:
        pi = (x.numpy() - b_dec_of_the_encoder) @ p["W_enc_T"].T + p["b_gate"]
        return float(((x.numpy() - references.relu(pi) @ p["W_dec"] - p["b_dec"]) ** 2).sum(-1).mean())

    step = 1e-6 * np.eye(3)
    wanted = [(auxiliary(p["b_dec"] + s) - auxiliary(p["b_dec"] - s)) / 2e-6 for s in step]
    gradient = gradients(sae, "auxiliary", x)["b_dec"]
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-5)


def test_jumprelu_threshold_learns_by_the_rectangle_estimate() -> None:
    """The gradient is ``-lambda / bandwidth`` where the pre-latent is within half a bandwidth, else zero."""
    sae = build("jumprelu", d_in=1, d_sae=3, bandwidth=0.2).double()
    with torch.no_grad():
        for tensor in (sae.W_enc_T, sae.b_dec, sae.W_dec):
            tensor.zero_()
        sae.threshold.fill_(1.0)
        sae.b_enc.copy_(
            torch.tensor([1.05, 1.15, 0.95])
        )  # within half a bandwidth above, outside, within half a bandwidth below
    sae.training_loss(torch.zeros(4, 1, dtype=torch.float64), sparsity_coefficient=0.6).terms["sparsity"].backward()
    assert sae.threshold.grad is not None
    np.testing.assert_allclose(sae.threshold.grad.numpy(), [-3.0, 0.0, -3.0])
    assert sae.b_enc.grad is None or not sae.b_enc.grad.any()


def test_gated_configuration_has_two_vectors_more_than_the_baseline() -> None:
    count = {name: sum(p.numel() for p in build(name, d_sae=32).parameters()) for name in ("gated", "standard")}
    assert count["gated"] - count["standard"] == 2 * 32
    assert GatedSAEConfig(d_in=2, d_sae=3).architecture == "gated"
