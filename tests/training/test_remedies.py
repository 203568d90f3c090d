"""Remedies for dead latents that add terms to the objective, on every architecture."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hf_gated_sae.training import SAETrainer, SAETrainingArguments
from hf_gated_sae.training.dead_latents import DeadLatents
from hf_gated_sae.training.remedies import DeadLatentRemedy, remedies
from hf_gated_sae.training.schedules import LearningRateDip

from .test_trainer import quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow

ADDING = [name for name, each in remedies.items() if each.terms is not DeadLatentRemedy.terms]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(SAETrainingArguments)}
DEAD = torch.tensor([3, 17, 40])


def remedy(name, sae, dead=DEAD, **changes):
    counters = DeadLatents(sae.config.d_sae, 10)
    counters.silent_for[dead] = 99
    args = SimpleNamespace(**{**DEFAULTS, **changes})
    return remedies[name](args, counters, LearningRateDip())


def gradients(name, architecture, dead=DEAD):
    sae = build(architecture, randomise=True)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    loss = sae.training_loss(x, sparsity_coefficient=0.1)
    terms = remedy(name, sae, dead).terms(sae, x, x, loss)
    if terms:
        sum(terms.values()).backward()
    return sae, terms


def test_all_remedies_that_add_to_the_objective_are_tested_here():
    assert set(remedies) - set(ADDING) == {"resample"} and len(ADDING) >= 3  # tested in `test_resample.py`


@pytest.mark.parametrize("name", remedies)
def test_a_run_with_many_dead_latents_stays_finite(arguments, name):
    sae = build("gated", D_IN)
    sae.b_gate.data[:10] = -30.0
    args = arguments(
        **{"dead_latent_remedy": name, "max_steps": 20, "dead_after_activations": 300, "recorded_activations": 0},
        **({"resample_steps": [12]} if name == "resample" else {}),
    )
    trainer = quiet(SAETrainer(sae, args, activations(2000, seed=0)))
    trainer.train()
    assert type(trainer.trainees[""].remedy) is remedies[name]
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


@pytest.mark.parametrize("name", ADDING)
def test_only_dead_latents_get_gradients(architecture, name):
    sae, terms = gradients(name, architecture)
    [term] = terms.values()
    assert term > 0
    alive = torch.ones(sae.config.d_sae, dtype=torch.bool)
    alive[DEAD] = False
    for parameter_name, parameter in sae.named_parameters():
        if parameter.grad is not None and len(parameter) == sae.config.d_sae:
            assert (parameter.grad[alive] == 0).all(), parameter_name
    encoder = sae.W_dec if sae.tied else sae.W_enc_T
    # Where latents compete, those whose pre-latent is negative on every activation have no gradient, as in the source.
    assert (encoder.grad[DEAD] != 0).any()


@pytest.mark.parametrize("name", ADDING)
def test_nothing_is_added_while_no_latent_is_dead(architecture, name):
    assert gradients(name, architecture, dead=DEAD[:0])[1] == {}


def test_margins_are_positive_exactly_where_a_latent_is_active(architecture):
    sae = build(architecture, randomise=True)
    if not sae.elementwise or sae.objective_class.competes:
        pytest.skip("its latents depend on each other")
    x = torch.randn(200, 8)
    on = sae.encode(x) > 0
    assert 0.1 < on.float().mean() < 0.9
    assert torch.equal(sae.margins(x, torch.arange(48)) > 0, on)


def test_auxk_equals_the_equation_of_its_source():
    sae = build("topk", randomise=True)
    x = torch.randn(30, 8)
    loss = sae.training_loss(x)
    term = remedy("auxk", sae, torch.arange(10, 40), auxk_latents=4, auxk_coefficient=0.5).terms(sae, x, x, loss)[
        "auxk"
    ]
    error = x - loss.reconstruction
    scores = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, 10:40]
    kept = torch.zeros_like(scores).scatter(-1, *reversed_pair(scores.topk(4)))
    left = (error - kept @ sae.W_dec[10:40]).square().sum(-1).mean()
    share = left / (error - error.mean(0)).square().sum(-1).mean()
    torch.testing.assert_close(term, 0.5 * share * (x - x.mean(0)).square().sum(-1).mean())


def reversed_pair(found):
    return found.indices, found.values


def test_ghost_gradients_equal_those_of_their_equation():
    sae = build("standard", randomise=True)
    x = torch.randn(30, 8)
    loss = sae.training_loss(x, sparsity_coefficient=0.1)
    [term] = remedy("ghost_gradients", sae).terms(sae, x, x, loss).values()
    torch.testing.assert_close(term, loss.terms["reconstruction"])
    term.backward()
    pulled, sae.W_dec.grad = sae.W_dec.grad[DEAD].clone(), None
    residual = (x - loss.reconstruction).detach()
    latents = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, DEAD].exp().detach()
    ghost = latents @ sae.W_dec[DEAD]
    scale = (residual.norm(dim=-1, keepdim=True) / (2 * ghost.norm(dim=-1, keepdim=True))).detach()
    error = (residual - ghost * scale).square().sum(-1).mean()
    (error * (residual.square().sum(-1).mean() / error).detach()).backward()
    torch.testing.assert_close(pulled, sae.W_dec.grad[DEAD])


def test_the_pull_is_the_distance_to_the_threshold():
    sae = build("jumprelu", randomise=True)
    x = torch.randn(30, 8)
    loss = sae.training_loss(x, sparsity_coefficient=0.1)
    [term] = remedy("pre_activation_pull", sae, pull_coefficient=2.0).terms(sae, x, x, loss).values()
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, DEAD]
    missing = torch.relu(sae.threshold[DEAD] - pre) * sae.W_dec[DEAD].norm(dim=-1)
    torch.testing.assert_close(term, 2.0 * missing.sum(-1).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("auxk", 7), ("pre_activation_pull", 3)])
def test_dead_latents_come_back(arguments, name, most):
    left = {}
    for remedied in (None, name):
        args = arguments(
            **{"dead_latent_remedy": remedied, "max_steps": 150, "dead_after_activations": 300},
            **{"pull_coefficient": 0.1, "learning_rate": 1e-2, "recorded_activations": 0},
        )
        sae = build("gated", D_IN)
        sae.b_gate.data[:10] = -3.0  # with an encoder this small these gates cannot open
        sae.W_enc_T.data[:10] *= 0.05
        trainer = quiet(SAETrainer(sae, args, activations(2000, seed=0)))
        trainer.train()
        left[remedied] = int(trainer.trainees[""].dead.mask[:10].sum())
    assert left[None] == 10 and left[name] <= most
