"""Variants of objectives, and annealing, in training."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from hf_gated_sae.architectures.gated import GatedSAE
from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.training import SAETrainer
from hf_gated_sae.training.annealing import PowerAnnealing
from hf_gated_sae.training.processes import Processes

from .test_trainer import measured, quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow


class Each(TrainerCallback):
    """Calls a function with the SAE after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(kwargs["model"])


def test_frozen_parameters_are_kept_and_trainable_again_afterwards(arguments):
    x = activations(1000, seed=0)
    baseline = build("standard", D_IN, 48)
    quiet(SAETrainer(baseline, arguments(max_steps=60, sparsity_coefficient=3.0), x)).train()
    sae = GatedSAE.from_standard(baseline)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    args = arguments(max_steps=200, objective={"rescale_and_shift": True}, dead_latent_remedy=None)
    quiet(SAETrainer(sae, args, x)).train()
    for name, parameter in sae.named_parameters():
        close = torch.allclose(parameter, before[name], rtol=1e-5, atol=1e-6)  # rescaled and scaled back
        assert close == (name not in ("r_mag", "b_mag")), name
        assert parameter.requires_grad and parameter.grad is None
    fitted, biased = measured(sae, x), measured(baseline, x)
    assert abs(fitted.relative_reconstruction_bias - 1) < abs(biased.relative_reconstruction_bias - 1) / 2
    assert fitted.fvu < biased.fvu


def test_a_tie_holds_after_every_step(arguments):
    def check(sae):
        assert torch.equal(sae.b_mag, sae.r_mag.exp() * sae.b_gate)
        seen.append(sae.b_mag.abs().max().item())

    seen = []
    args = arguments(objective={"tied_b_mag": True}, resample_steps=[5], dead_after_activations=1)
    quiet(SAETrainer(build("gated", D_IN), args, activations(500, seed=0), callbacks=[Each(check)])).train()
    assert len(seen) == 10 and seen[-1] > 0


@pytest.mark.parametrize("name, scale", [("jumprelu", "unit"), ("glu", "none")])
def test_no_threshold_is_negative_after_any_step(arguments, name, scale):
    """Steps this large would make most thresholds negative, in any unit."""

    def check(sae):
        assert (sae.threshold >= 0).all()
        moved.append((sae.threshold > 0).float().mean().item())

    moved = []
    args = arguments(learning_rate=0.1, sparsity_coefficient=0.0, activation_scale=scale, resample_steps=[5])
    sae = build(name, D_IN, randomise=True, bandwidth=1.0)
    quiet(SAETrainer(sae, args, activations(500, seed=0), callbacks=[Each(check)])).train()
    assert len(moved) == 10 and 0 < moved[-1] < 1 and (sae.threshold >= 0).all()


def test_variants_can_be_given_as_a_flag(arguments):
    args = arguments(objective=json.dumps({"auxiliary": False}), sparsity_coefficient="0.25")
    trainer = quiet(SAETrainer(build("gated", D_IN), args, activations(500, seed=0)))
    trainer.train()
    assert "loss_auxiliary" not in trainer.state.log_history[0] and trainer.trainees[""].coefficient == 0.25


def test_unknown_and_contradictory_variants_are_refused(arguments):
    x = activations(500, seed=0)
    gated = build("gated", D_IN)
    with pytest.raises(UnknownNameError, match="Did you mean 'frozen_decoder'"):
        SAETrainer(gated, arguments(objective={"frozen_decodr": True}), x)
    with pytest.raises(InputError, match="frozen_decoder is 'no'; expected true or false"):
        SAETrainer(gated, arguments(objective={"frozen_decoder": "no"}), x)
    with pytest.raises(InputError, match="choose one of the two"):
        SAETrainer(gated, arguments(objective={"weighted_by_decoder_norm": True}), x)
    with pytest.raises(InputError, match="objective is 'frozen'; expected a mapping"):
        arguments(objective="frozen")
    with pytest.raises(InputError, match="sparsity_coefficient is 'much'"):
        arguments(sparsity_coefficient="much")
    annealed = {"sparsity_power_end": 0.5, "sparsity_power_steps": [2, 8]}
    with pytest.raises(InputError, match="has no power that could be annealed"):
        SAETrainer(build("topk", D_IN), arguments(**annealed), x)
    with pytest.raises(InputError, match="until step 8, but there are max_steps = 8"):
        arguments(max_steps=8, **annealed)
    with pytest.raises(InputError, match="expected a power above 0"):
        arguments(sparsity_power_end=0.0)
    with pytest.raises(InputError, match="a first and a last step"):
        arguments(sparsity_power_steps=[8, 2])


def test_the_power_is_annealed_and_the_penalty_kept():
    annealing = PowerAnnealing(0.4, first=4, last=10, changes=3, batches=2)
    batches = {step: torch.full((5, 2), float(step)) for step in range(12)}
    powers, asked = [], []

    def penalty(power, x, target):
        asked.append((power, x[0, 0].item()))
        return x.pow(power).sum().item()

    for step, x in batches.items():
        annealing.observe(step, x, x)
        annealing.advance(step + 1, penalty, Processes())
        powers.append(annealing.power)
    assert powers == pytest.approx([1] * 3 + [0.8] * 3 + [0.6] * 3 + [0.4] * 3)
    # the change after 4 steps uses the last two batches, those of steps 2 and 3
    assert asked[:4] == [(1.0, 2.0), (1.0, 3.0), (0.8, 2.0), (0.8, 3.0)]
    expected = 1.0
    for old, new, seen in ((1, 0.8, (2, 3)), (0.8, 0.6, (5, 6)), (0.6, 0.4, (8, 9))):
        expected *= sum(x**old for x in seen) / sum(x**new for x in seen)
    assert annealing.factor == pytest.approx(expected)
    assert PowerAnnealing(1.0, 4, 10, 3, 2)._powers == {}


def test_a_run_anneals_what_it_minimises(arguments):
    x, sparsities = activations(1000, seed=0), []
    args = arguments(
        **{"sparsity_power_end": 0.5, "sparsity_power_steps": [10, 20], "sparsity_power_changes": 2},
        max_steps=30,
        learning_rate=0.0,
        logging_steps=1,
        activation_batch_size=1000,
    )
    trainer = quiet(SAETrainer(build("gated", D_IN), args, x))
    trainer.train()
    sparsities = [entry["loss_sparsity"] for entry in trainer.state.log_history if "loss_sparsity" in entry]
    trainee = trainer.trainees[""]
    assert trainee.annealing.power == 0.5 and trainee.annealing.factor != 1
    # every batch holds all activations and the learning rate is 0: the term is the same at every power
    assert sparsities == pytest.approx([sparsities[0]] * 30, rel=1e-3)
