"""Each architecture against plain numpy in float64, written from the papers' equations and not from our code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae import GatedSAE, GatedSAEConfig
from hf_gated_sae.architectures import architectures
from hf_gated_sae.architectures.gated_untied import UntiedGatedSAE
from hf_gated_sae.modeling import SAEModel
from tests.support.example_saes import build, randomised

Array = np.ndarray[Any, np.dtype[np.float64]]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def relu(values: Array) -> Array:
    return np.where(values > 0, values, 0.0)


def gated(x: Array, p: dict[str, Array], k: int) -> Array:
    """Equations 6 and 7 of arXiv 2404.16014: a Heaviside gate times a ReLU magnitude, with tied encoders."""
    w_gate = p["W_enc_T"]
    w_mag = np.exp(p["r_mag"])[:, None] * w_gate
    is_open = (x @ w_gate.T + p["b_gate"]) > 0
    return is_open.astype(float) * relu(x @ w_mag.T + p["b_mag"])


def standard(x: Array, p: dict[str, Array], k: int) -> Array:
    return relu(x @ p["W_enc_T"].T + p["b_enc"])


def jumprelu(x: Array, p: dict[str, Array], k: int) -> Array:
    z = x @ p["W_enc_T"].T + p["b_enc"]
    return np.where(z > p["threshold"], relu(z), 0.0)


def topk(x: Array, p: dict[str, Array], k: int) -> Array:
    z = relu(x @ p["W_enc_T"].T + p["b_enc"])
    latents = np.zeros_like(z)
    for row, values in enumerate(z):
        kept = np.argsort(-values, kind="stable")[:k]
        latents[row, kept] = values[kept]
    return latents


def abs_topk(x: Array, p: dict[str, Array], k: int) -> Array:
    z = x @ p["W_enc_T"].T + p["b_enc"]
    smallest = np.sort(np.abs(z), axis=-1)[:, -k, None]
    return np.where(np.abs(z) >= smallest, z, 0.0)


def tanh_relu(x: Array, p: dict[str, Array], k: int) -> Array:
    return np.tanh(standard(x, p, k))


def matching_pursuit(x: Array, p: dict[str, Array], k: int, *, threshold: float = 1e-2, steps: int = 0) -> Array:
    """One token after the other: take the best matching decoder row out of what is left, until a rule says stop."""
    latents = np.zeros((len(x), len(p["W_dec"])))
    for token, left in enumerate(x.copy()):
        for _ in range(steps or x.shape[-1]):
            matches = p["W_dec"] @ left
            best = int(np.argmax(matches))
            support = set(np.flatnonzero(latents[token]))
            if matches[best] > 0:
                latents[token, best] += matches[best]
                left = left - matches[best] * p["W_dec"][best]
            if set(np.flatnonzero(latents[token])) == support or np.linalg.norm(left) < threshold:
                break
    return latents


REFERENCES = {
    "gated": gated,
    "standard": standard,
    "jumprelu": jumprelu,
    "topk": topk,
    "batch_topk": jumprelu,
    "abs_topk": abs_topk,
    "tanh_relu": tanh_relu,
    "matching_pursuit": matching_pursuit,
}


def numpy_parameters(sae: SAEModel) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    d_sae = draw(st.integers(1, 24))
    return {
        "d_in": draw(st.integers(1, 9)),
        "d_out": draw(st.one_of(st.none(), st.integers(1, 9))),
        "d_sae": d_sae,
        "k": draw(st.integers(1, d_sae)),
        "tokens": draw(st.integers(0, 5)),
        "apply_b_dec_to_input": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
        "scale": draw(st.sampled_from([1e-3, 1.0, 1e3])),
    }


@pytest.mark.parametrize("architecture", list(REFERENCES))
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_encode_and_decode_are_the_equations(architecture: str, case: dict[str, Any]) -> None:
    tokens, seed, scale = case.pop("tokens"), case.pop("seed"), case.pop("scale")
    if case["d_out"] not in (None, case["d_in"]):
        case["apply_b_dec_to_input"] = False  # a transcoder's decoder bias has another width
        if architectures[architecture].tied:
            case["d_out"] = None
    sae = randomised(build(architecture, **case), seed).double()
    x = scale * np.random.default_rng(seed).normal(size=(tokens, case["d_in"]))
    parameters = numpy_parameters(sae)
    centred = x - parameters["b_dec"] if case["apply_b_dec_to_input"] else x
    wanted = REFERENCES[architecture](centred, parameters, case["k"])
    with torch.no_grad():
        output = sae(torch.from_numpy(x))
    np.testing.assert_allclose(output.latents.numpy(), wanted, **TIGHT)
    np.testing.assert_allclose(
        output.reconstruction.numpy(), wanted @ parameters["W_dec"] + parameters["b_dec"], **TIGHT
    )


def test_every_architecture_has_a_reference() -> None:
    """Remind whoever adds an architecture; those with one are compared above."""
    assert set(REFERENCES) <= set(architectures)


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
                sae.b_gate.fill_(-2.0)  # the magnitude at the border is 2
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
    """``k * tokens`` latents are kept in all, wherever they are; the threshold follows the smallest of them."""
    sae = randomised(build("batch_topk", d_in=4, d_sae=12, k=2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    z = relu(standard(x.numpy() - numpy_parameters(sae)["b_dec"], numpy_parameters(sae), 0))
    kept = np.sort(z[z > 0])[::-1][:12]
    before = sae.threshold.item()
    latents = sae.training_loss(x).latents.detach().numpy()
    np.testing.assert_allclose(latents, np.where(z >= kept[-1], z, 0.0), **TIGHT)
    momentum = sae.config.threshold_momentum
    assert sae.threshold.item() == pytest.approx(momentum * before + (1 - momentum) * kept[-1])


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def temporal(x: Array, p: dict[str, Array], *, heads: int, k: int | None, c: float) -> tuple[Array, Array]:
    """Section 3 of arXiv 2511.01836 for one sequence, position by position and head by head."""
    d, dec, enc = x.shape[-1], p["W_dec"], p["W_enc_T"].T
    left, predicted = c * x - p["b_dec"], np.zeros((len(x), len(dec)))
    for layer in range(sum(name.endswith("query.weight") for name in p)):
        w = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"attention.{layer}.")}
        codes = relu(left @ enc / (4 * d))
        earlier = np.vstack([np.zeros_like(codes[:1]), codes[:-1]])
        q, key, v = (
            part @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            for name, part in (("query", codes), ("key", earlier), ("value", earlier))
        )
        width, value_width = q.shape[1] // heads, v.shape[1] // heads
        for token in range(len(x)):
            mixed = []
            for head in range(heads):
                mine = slice(head * width, (head + 1) * width)
                weights = softmax(key[: token + 1, mine] @ q[token, mine] / np.sqrt(width))
                mixed.append(weights @ v[: token + 1, head * value_width : (head + 1) * value_width])
            code = relu(np.concatenate(mixed) @ w["output.weight"].T + w["output.bias"])
            written = code @ dec
            share = written @ left[token] / (np.linalg.norm(written) + 1e-6) ** 2
            predicted[token] += share * code
            left[token] = left[token] - share * written
    novel = relu(left @ enc / (4 * d))
    for row in novel:
        row[np.argsort(-row, kind="stable")[k or len(row) :]] = 0
    return novel, ((novel + predicted) @ dec + p["b_dec"]) / c


@pytest.mark.parametrize("settings_", [{"k": 2}, {"k": None, "heads": 2, "bottleneck": 3, "attention_layers": 2}])
@pytest.mark.parametrize("c", [1.0, 0.03])
def test_temporal_is_the_equations(settings_: dict[str, Any], c: float) -> None:
    sae = randomised(build("temporal", d_in=5, d_sae=12, scaling_factor=c, **settings_)).double()
    x = 3 / c * np.random.default_rng(0).normal(size=(2, 7, 5))
    with torch.no_grad():
        output = sae(torch.from_numpy(x))
    for row in range(2):
        parameters = numpy_parameters(sae)
        novel, reconstruction = temporal(x[row], parameters, heads=sae.config.heads, k=settings_["k"], c=c)
        np.testing.assert_allclose(output.latents[row].numpy(), novel, **TIGHT)
        np.testing.assert_allclose(output.reconstruction[row].numpy(), reconstruction, rtol=1e-9)
    one = torch.zeros_like(output.latents)
    one[..., 4] = 1.0
    moved = sae.decode(output.latents + one, torch.from_numpy(x)) - output.reconstruction
    torch.testing.assert_close(moved, (sae.W_dec[4] * sae.written_scale(torch.from_numpy(x))).detach())


@pytest.mark.parametrize("rule", ["threshold", "steps", "support"])
def test_matching_pursuit_stops(rule: str) -> None:
    """Each rule on its own, on orthonormal rows where the pursuit can be followed by hand."""
    off = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
    on = {
        "threshold": {"residual_threshold": 1.2},  # what is left after 5, 2 and 1 has norm 1
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
    """With r_mag = 0 and small whole numbers nothing is rounded, and the difference is zero in float32 too."""
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
    assert both.float().mean() > 0.9999  # within rounding of the threshold either side is right
    torch.testing.assert_close(left[both], right[both], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_conversion_keeps_dtype_place_and_records(dtype: torch.dtype) -> None:
    sae = gated_sae(2, dtype=dtype)
    sae.config.site, sae.config.base_model = "resid_post.4", "acme/lm"
    for other in (sae.to_jumprelu(), GatedSAE.from_jumprelu(sae.to_jumprelu())):
        assert other.W_dec.dtype == dtype and other.config.site == "resid_post.4"
        assert other.config.base_model == "acme/lm" and other.W_dec.requires_grad
        assert torch.equal(other.max_activation, sae.max_activation)
        assert torch.equal(other.W_dec, sae.W_dec)


def test_conversion_of_halves_rounds_neither_thresholds_nor_records(tmp_path: Path) -> None:
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


def test_gated_loss_is_equation_8() -> None:
    sae = gated_sae(3, dtype=torch.float64)
    x = torch.randn(50, 5, dtype=torch.float64)
    p = numpy_parameters(sae)
    centred = x.numpy() - p["b_dec"]
    pi = centred @ p["W_enc_T"].T + p["b_gate"]
    latents = gated(centred, p, 0)

    def decode(values: Array) -> Array:
        return values @ p["W_dec"] + p["b_dec"]

    wanted = {
        "reconstruction": ((x.numpy() - decode(latents)) ** 2).sum(-1).mean(),
        "sparsity": 0.7 * np.abs(relu(pi)).sum(-1).mean(),
        "auxiliary": ((x.numpy() - decode(relu(pi))) ** 2).sum(-1).mean(),
    }
    loss = sae.training_loss(x, sparsity_coefficient=0.7)
    assert set(loss.terms) == set(wanted)
    for name, value in wanted.items():
        assert loss.terms[name].item() == pytest.approx(value, rel=1e-12), name
    assert loss.total.item() == pytest.approx(sum(wanted.values()), rel=1e-12)


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
def test_gated_gradients_take_the_paper_s_routes(parameter: str, term: str) -> None:
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
        return float(((x.numpy() - relu(pi) @ p["W_dec"] - p["b_dec"]) ** 2).sum(-1).mean())

    step = 1e-6 * np.eye(3)
    wanted = [(auxiliary(p["b_dec"] + s) - auxiliary(p["b_dec"] - s)) / 2e-6 for s in step]
    gradient = gradients(sae, "auxiliary", x)["b_dec"]
    assert gradient is not None
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-5)


def test_jumprelu_threshold_learns_by_the_rectangle_estimate() -> None:
    """Its gradient is ``-lambda / bandwidth`` where the pre-latent is within half a bandwidth of it, else zero."""
    sae = build("jumprelu", d_in=1, d_sae=3, bandwidth=0.2).double()
    with torch.no_grad():
        for tensor in (sae.W_enc_T, sae.b_dec, sae.W_dec):
            tensor.zero_()
        sae.threshold.fill_(1.0)
        sae.b_enc.copy_(torch.tensor([1.05, 1.15, 0.95]))  # inside above, outside, inside below
    sae.training_loss(torch.zeros(4, 1, dtype=torch.float64), sparsity_coefficient=0.6).terms["sparsity"].backward()
    assert sae.threshold.grad is not None
    np.testing.assert_allclose(sae.threshold.grad.numpy(), [-3.0, 0.0, -3.0])
    assert sae.b_enc.grad is None or not sae.b_enc.grad.any()


def test_gated_configuration_has_two_vectors_more_than_the_baseline() -> None:
    count = {name: sum(p.numel() for p in build(name, d_sae=32).parameters()) for name in ("gated", "standard")}
    assert count["gated"] - count["standard"] == 2 * 32
    assert GatedSAEConfig(d_in=2, d_sae=3).architecture == "gated"
