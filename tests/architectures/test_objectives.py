"""Training objectives: each term moves the right parameters, and sparse training steps equal dense ones."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_gated_sae import GatedSAE, SAEModel
from hf_gated_sae.architectures import architectures
from hf_gated_sae.architectures.gated import GatedObjective
from hf_gated_sae.architectures.gated_untied import UntiedGatedSAE
from hf_gated_sae.architectures.jumprelu import JumpReLUObjective
from hf_gated_sae.architectures.standard import StandardObjective
from hf_gated_sae.errors import InputError, ShapeError
from hf_gated_sae.functional.cpu import bf16_screening
from hf_gated_sae.functional.cpu import sparse_support as supports
from hf_gated_sae.functional.sparse_latents import SparseLatents
from hf_gated_sae.modeling import Objective, TopKObjective
from hf_gated_sae.training.take_rows import take_rows

D_IN, D_SAE, TOKENS = 24, 2048, 520
FEW = 2.2
"""Threshold in standard deviations, which about 1.4 % of the projections exceed."""


def example(architecture: str, dtype: torch.dtype = torch.float64, **settings: Any) -> SAEModel:
    """Return an SAE with random tensors and few active latents on standard normal activations."""
    generator = torch.Generator().manual_seed(0)
    sae_class = architectures[architecture]
    if "k" in sae_class.config_class.__annotations__:
        settings.setdefault("k", 12)
    sae = sae_class(sae_class.config_class(d_in=D_IN, d_sae=D_SAE, **settings)).to(dtype)
    for name, tensor in sae.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name in ("b_gate", "b_enc"):
            tensor.copy_(noise * 0.1 - FEW)
        elif name == "b_mag":
            tensor.copy_(noise * 0.1 - FEW + 0.3)
        elif name == "threshold":
            tensor.copy_(torch.full_like(tensor, 0.3) if tensor.ndim == 0 else noise.abs() * 0.1 + 0.05)
        elif tensor.ndim == 2:
            tensor.copy_(torch.nn.functional.normalize(noise, dim=-1) * (1 + 0.1 * noise[:, :1]))
        elif name in ("b_dec", "r_mag"):
            tensor.copy_(noise * 0.2)
    return sae


def activations(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def step(sae: SAEModel, x: Tensor, *, bf16: bool = False, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    sae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = sae.training_loss(x, **{"sparsity_coefficient": 0.3, **settings})
    loss.total.backward()
    return loss, {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supports.SparseSupport, "serves", staticmethod(lambda *_: False))


def screens(monkeypatch: pytest.MonkeyPatch, available: bool) -> list[Any]:
    """Turn screens on or off, and return those that are made; on a CPU without bfloat16 they only take longer."""
    made: list[Any] = []
    of = bf16_screening.screen_of
    monkeypatch.setattr(bf16_screening, "_AVAILABLE", available)
    monkeypatch.setattr(
        bf16_screening, "screen_of", lambda x, rounding: made.append(of(x, rounding=rounding)) or made[-1]
    )
    return made


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gated", {}, {}),
    ("gated", {"apply_b_dec_to_input": False}, {}),
    ("gated", {}, {"objective": GatedObjective(frozen_decoder=False)}),
    ("gated", {}, {"objective": GatedObjective(tied_b_mag=True)}),
    ("gated", {}, {"objective": GatedObjective(weighted_by_decoder_norm=True)}),
    ("gated", {}, {"objective": GatedObjective(weighted_by_decoder_norm=True, frozen_decoder=False)}),
    ("gated", {}, {"objective": GatedObjective(auxiliary=False)}),
    ("gated", {}, {"objective": GatedObjective(rescale_and_shift=True)}),
    ("gated", {}, {"sparsity_power": 0.6}),
    ("gated", {"site": "mlp_in.1", "site_out": "mlp_out.1", "apply_b_dec_to_input": False}, {"target": True}),
    (
        "gated",
        {"site": "mlp_in.1", "site_out": "mlp_out.1", "apply_b_dec_to_input": False, "skip_connection": True},
        {"target": True},
    ),
    ("gated_untied", {}, {}),
    ("standard", {}, {}),
    ("standard", {}, {"objective": StandardObjective(weighted_by_decoder_norm=True), "sparsity_power": 0.7}),
    ("jumprelu", {"bandwidth": 0.2}, {}),
    ("jumprelu", {"bandwidth": 0.2}, {"objective": JumpReLUObjective(tanh_scale=4.0)}),
    ("tanh_relu", {}, {}),
    ("topk", {}, {}),
    ("topk", {"rank_by_decoder_norm": True}, {}),
    ("topk", {"rectified": False}, {}),
    ("topk", {}, {"objective": TopKObjective(prefixes=(0.1, 0.5))}),
    ("abs_topk", {}, {}),
    ("group_max", {"groups": 16}, {}),
    ("batch_topk", {}, {}),
]


@pytest.mark.parametrize(
    "dtype, tolerance, screened",
    [(torch.float64, 1e-12, False), (torch.float32, 1e-6, False), (torch.float32, 1e-6, True)],
)
@pytest.mark.parametrize("architecture, settings, options", CASES)
def test_a_sparse_step_equals_the_dense_step(
    architecture: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    screened: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = screens(monkeypatch, screened)
    if options.get("sparsity_power") and dtype == torch.float32:
        tolerance *= 20  # the slope of the root magnifies rounding errors of the projections
    x = activations(dtype)
    target = {"target": x.roll(1, 0) @ x.new_ones(D_IN, D_IN)} if options.get("target") else {}
    live, found = step(example(architecture, dtype, **settings), x, **{**options, **target})
    dense(monkeypatch)
    plain, wanted = step(example(architecture, dtype, **settings), x, **{**options, **target})
    assert isinstance(live.latents, SparseLatents) and isinstance(plain.latents, Tensor)
    sorts = architecture in ("abs_topk", "group_max") or "rank_by_decoder_norm" in settings
    assert len(used) == (screened and not sorts)
    torch.testing.assert_close(live.latents.dense(), plain.latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(live.fired, plain.fired) and live.l0 == plain.l0 and 0 < live.l0 < 0.05 * D_SAE
    assert live.terms.keys() == plain.terms.keys()
    for name, term in live.terms.items():
        torch.testing.assert_close(term, plain.terms[name], rtol=tolerance, atol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-30)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("architecture, settings, options", CASES)
def test_a_batch_is_freed_with_its_loss(architecture: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Immediately, not at the next garbage collection: a batch may be large."""
    sae, held, places = example(architecture, **settings), activations(), []
    gc.disable()
    try:
        for _ in range(6):
            x = take_rows(held, torch.arange(TOKENS))
            places.append(x.data_ptr())
            loss, _ = step(sae, x, **{**options, **({"target": x} if options.get("target") else {})})
            assert isinstance(loss.latents, SparseLatents)
            del x, loss
    finally:
        gc.enable()
    assert len(set(places)) <= 2


@pytest.mark.parametrize("architecture, settings, options", CASES)
def test_no_activations_give_zero_gradients(
    architecture: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """A process of several may have none, or a caller may filter all of them out."""
    x = activations()[:0]
    loss, found = step(
        example(architecture, **settings), x, **{**options, **({"target": x} if options.get("target") else {})}
    )
    assert loss.fired.shape == (D_SAE,) and not loss.fired.any()
    assert not any(gradient.nan_to_num().any() for gradient in found.values())


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "topk", "batch_topk"])
def test_under_autocast_only_screened_projections_are_rounded(
    architecture: str, screened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later operations are not rounded, so errors are below those of rounded products, up to chance."""
    used = screens(monkeypatch, screened)
    x, settings = activations(torch.float32), {"bandwidth": 0.2} if architecture == "jumprelu" else {}

    def errors(loss: Any, gradients: dict[str, Tensor]) -> dict[str, float]:
        latents = (code.dense() if isinstance(code := each.latents, SparseLatents) else code for each in (loss, plain))
        pairs = {name: (each, wanted[name]) for name, each in gradients.items()} | {"latents": tuple(latents)}
        return {name: float((each - own).norm() / own.norm()) for name, (each, own) in pairs.items()}

    plain, wanted = step(example(architecture, torch.float32, **settings), x)
    rounded = step(example(architecture, torch.float32, **settings), x, bf16=True)
    assert [type(each) for each in used] == [bf16_screening.BoundedScreen, bf16_screening.Screen] * screened
    assert isinstance(rounded[0].latents, SparseLatents) and rounded[0].latents.values.dtype == torch.float32
    on, was = rounded[0].latents.dense() != 0, plain.latents.dense() != 0
    assert (on != was).sum() <= (0.02 if screened else 0) * was.sum()
    dense(monkeypatch)
    products = errors(*step(example(architecture, torch.float32, **settings), x, bf16=True))
    for name, error in errors(*rounded).items():
        assert error <= (1.2 * products[name] if screened else 1e-6), name


def test_many_active_latents_take_the_dense_step() -> None:
    sae = example("gated")
    sae.b_gate.data.zero_()
    assert isinstance(sae.training_loss(activations(), sparsity_coefficient=1.0).latents, Tensor)


def test_no_active_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = example("gated")
    sae.b_gate.data.fill_(-100.0)
    loss, found = step(sae, activations())
    assert isinstance(loss.latents, SparseLatents) and loss.l0 == 0 and not loss.fired.any()
    dense(monkeypatch)
    _, wanted = step(sae, activations())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12)


def test_leading_axes_are_tokens() -> None:
    sae, x = example("gated"), activations()
    flat, wanted = step(sae, x)
    folded, found = step(sae, x.reshape(4, 130, D_IN))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert folded.reconstruction.shape == (4, 130, D_IN)
    assert torch.equal(folded.reconstruction.reshape(TOKENS, D_IN), flat.reconstruction)
    assert folded.latents.shape == (4, 130, D_SAE)


def test_gradients_reach_activations_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for _ in range(2):
        x = activations().requires_grad_()
        example("gated").training_loss(x, sparsity_coefficient=0.3).total.backward()
        gradients.append(x.grad)
        dense(monkeypatch)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


# The table of the paper's objective (section 3.2.2 and appendix G): which term may move which parameter.
ROUTES = {
    "reconstruction": {"W_enc_T", "r_mag", "b_mag", "W_dec", "b_dec"},
    "sparsity": {"W_enc_T", "b_gate", "b_dec"},
    "auxiliary": {"W_enc_T", "b_gate", "b_dec"},
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("term", ROUTES)
def test_gradients_of_the_gated_objective_flow_as_in_the_paper(
    term: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not live:
        dense(monkeypatch)
    sae = example("gated")
    sae.training_loss(activations(), sparsity_coefficient=0.3).terms[term].backward()
    moved = {name for name, p in sae.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert moved == ROUTES[term]


@pytest.mark.parametrize("live", [True, False])
def test_sparsity_and_auxiliary_move_the_decoder_bias_only_by_centring(
    live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without centring these terms do not move `b_dec`, because they use a frozen decoder."""
    if not live:
        dense(monkeypatch)
    for term in ("sparsity", "auxiliary"):
        sae = example("gated", apply_b_dec_to_input=False)
        sae.training_loss(activations(), sparsity_coefficient=0.3).terms[term].backward()
        assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def test_an_unfrozen_decoder_is_moved_by_the_auxiliary_term() -> None:
    sae = example("gated")
    objective = GatedObjective(frozen_decoder=False)
    sae.training_loss(activations(), sparsity_coefficient=0.3, objective=objective).terms["auxiliary"].backward()
    assert sae.W_dec.grad.any()


def test_only_open_gates_with_a_magnitude_move_the_encoder_by_reconstruction() -> None:
    sae, x = example("gated"), activations()
    loss = sae.training_loss(x, sparsity_coefficient=0.3)
    loss.terms["reconstruction"].backward()
    assert torch.equal(sae.W_enc_T.grad.any(-1), loss.fired)


def test_a_tied_magnitude_bias_is_stored_and_not_trained() -> None:
    sae, objective = example("gated"), GatedObjective(tied_b_mag=True)
    sae.training_loss(activations(), sparsity_coefficient=0.3, objective=objective).terms["reconstruction"].backward()
    assert sae.b_mag.grad is None and sae.b_gate.grad.any() and sae.r_mag.grad.any()
    objective.constrain(sae)
    assert torch.equal(sae.b_mag, sae.r_mag.exp() * sae.b_gate)
    gate, latents = sae.halves(sae._project(activations(), None), None)
    torch.testing.assert_close(latents, sae.r_mag.exp() * torch.relu(gate))  # a ReLU times a scale: no jump
    assert objective.frozen(sae) == {"b_mag"} and GatedObjective(learn_r_mag=False).frozen(sae) == {"r_mag"}


def test_an_untied_sae_starts_as_the_gated_one_and_trains_its_magnitudes_separately() -> None:
    gated, x = example("gated"), activations()
    sae = UntiedGatedSAE.from_gated(gated)
    torch.testing.assert_close(sae(x).latents, gated(x).latents)
    sae.training_loss(x, sparsity_coefficient=0.3).terms["reconstruction"].backward()
    assert sae.W_mag_T.grad.any() and sae.W_enc_T.grad is None and sae.b_gate.grad is None


def test_rescale_and_shift_starts_as_the_baseline_and_trains_nothing_else() -> None:
    baseline = example("standard")
    sae, objective = GatedSAE.from_standard(baseline), GatedObjective(rescale_and_shift=True)
    torch.testing.assert_close(sae(activations()).latents, baseline(activations()).latents)
    assert {name for name, _ in sae.named_parameters()} - objective.frozen(sae) == {"r_mag", "b_mag"}
    loss = sae.training_loss(activations(), sparsity_coefficient=0.3, objective=objective)
    assert set(loss.terms) == {"reconstruction"}
    with pytest.raises(InputError, match="trains only r_mag and b_mag, from the reconstruction alone"):
        GatedObjective(rescale_and_shift=True, tied_b_mag=True)


@pytest.mark.parametrize("architecture", ["jumprelu", "glu"])
def test_negative_thresholds_become_zero_which_changes_no_latent(architecture: str) -> None:
    sae, x = example(architecture), activations()
    sae.threshold.data[::2] *= -1
    before, kept = sae.encode(x), sae.threshold[1::2].clone()
    JumpReLUObjective().constrain(sae)
    assert not sae.threshold[::2].any() and torch.equal(sae.threshold[1::2], kept)
    assert torch.equal(sae.encode(x), before) and sae.threshold.requires_grad


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("architecture, objective", [("gated", GatedObjective), ("standard", StandardObjective)])
def test_weighted_sparsity_is_invariant_to_the_scale_of_latents(
    architecture: str, objective: Any, power: float
) -> None:
    """Scaling encoder rows up and decoder rows down changes only the unweighted penalty."""
    sae, x = example(architecture), activations()
    scaled = example(architecture)
    factor = 0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, tensor in scaled.named_parameters():
        if name == "W_dec":
            tensor.data /= factor[:, None]
        elif name in ("W_enc_T", "b_enc", "b_gate", "b_mag"):
            tensor.data *= factor.reshape(-1, *[1] * (tensor.ndim - 1))
    for weighted in (True, False):
        way = objective(weighted_by_decoder_norm=weighted)
        paid, same = (
            each.training_loss(x, sparsity_coefficient=0.3, sparsity_power=power, objective=way).terms["sparsity"]
            for each in (sae, scaled)
        )
        assert torch.allclose(paid, same, rtol=1e-10) == weighted


@pytest.mark.parametrize("frozen", [True, False])
def test_the_weights_of_the_sparsity_are_frozen_with_the_decoder(frozen: bool) -> None:
    sae, objective = example("gated"), GatedObjective(weighted_by_decoder_norm=True, frozen_decoder=frozen)
    terms = sae.training_loss(activations(), sparsity_coefficient=0.3, sparsity_power=0.5, objective=objective).terms
    terms["sparsity"].backward()
    assert (sae.W_dec.grad is None or not sae.W_dec.grad.any()) == frozen


def test_a_power_changes_the_penalty_and_nothing_else() -> None:
    sae, x = example("gated"), activations()
    gate, _ = sae.halves(sae._project(x, None), None)
    loss = sae.training_loss(x, sparsity_coefficient=0.3, sparsity_power=0.5)
    torch.testing.assert_close(loss.terms["sparsity"], 0.3 * torch.relu(gate).sqrt().sum(-1).mean())
    torch.testing.assert_close(
        loss.terms["auxiliary"], sae.training_loss(x, sparsity_coefficient=0.3).terms["auxiliary"]
    )


def test_prefixes_reconstruct_alone() -> None:
    sae, x = example("topk"), activations()
    loss = sae.training_loss(x, objective=TopKObjective(prefixes=(0.25,)))
    latents = sae.encode(x)
    latents[:, D_SAE // 4 :] = 0
    expected = (x - sae.decode(latents)).square().sum(-1).mean()
    torch.testing.assert_close(loss.terms[f"reconstruction_{D_SAE // 4}"], expected)
    with pytest.raises(InputError, match=r"prefixes is \[1.5\]"):
        TopKObjective(prefixes=(1.5,))
    for alike in ((0.5, 0.50001), (0.99999,)):
        with pytest.raises(InputError, match="expected different numbers, each less than all"):
            sae.training_loss(x, objective=TopKObjective(prefixes=alike))


def test_the_running_threshold_starts_with_the_first_batch() -> None:
    sae = example("batch_topk")
    sae.threshold.zero_()
    latents = sae.training_loss(activations()).latents
    assert sae.threshold == latents.values.min()


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_many_kept_latents_take_the_dense_step(architecture: str) -> None:
    assert isinstance(example(architecture, k=D_SAE // 8).training_loss(activations()).latents, Tensor)


def test_batch_topk_keeps_the_largest_whatever_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the tokens narrows the search and never changes the result."""
    sae, x = example("batch_topk"), activations()
    found = sae.training_loss(x).latents
    x[::2] *= 1e-3  # nearly all tokens in the sample
    misled = sae.training_loss(x).latents
    monkeypatch.setattr(type(sae), "_guess", lambda self, x: torch.tensor(1e3, dtype=x.dtype))
    refused = sae.training_loss(x).latents
    dense(monkeypatch)
    wanted = sae.training_loss(x).latents
    assert isinstance(found, SparseLatents) and isinstance(refused, Tensor)
    assert (wanted != 0).sum() == 12 * TOKENS
    for latents in (misled, refused):
        whole = latents.dense() if isinstance(latents, SparseLatents) else latents
        torch.testing.assert_close(whole, wanted, rtol=1e-12, atol=1e-12)


def test_every_architecture_has_an_objective() -> None:
    for name, sae_class in architectures.items():
        assert issubclass(sae_class.objective_class, Objective), name


def test_a_target_of_another_width_is_refused() -> None:
    sae = example("gated")
    with pytest.raises(ShapeError, match=r"a target \[520, 7\]"):
        sae.training_loss(activations(), target=torch.zeros(TOKENS, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"normalization": "layer_norm"}, "normalises each token (layer_norm)"),
        ({"kept_latents": [3, 5]}, "holds only 2 of its 2048 latents"),
    ],
)
def test_normalised_and_partly_loaded_saes_cannot_be_trained(change: dict[str, Any], said: str) -> None:
    for architecture in ("gated", "standard", "jumprelu", "topk", "batch_topk"):
        with pytest.raises(InputError, match=re.escape(said)):
            example(architecture, **change).training_loss(activations())


def test_measuring_moves_no_threshold() -> None:
    sae, x = example("batch_topk"), activations()
    before = sae.threshold.clone()
    with torch.no_grad():
        measured = sae.training_loss(x)
    assert torch.equal(sae.threshold, before)
    assert torch.equal(sae.training_loss(x).total, measured.total) and not torch.equal(sae.threshold, before)
