from __future__ import annotations

import re
import warnings

import pytest
import torch

from hf_gated_sae.training import SAETrainer
from hf_gated_sae.training.dead_latents import DeadLatents
from hf_gated_sae.training.remedies.resample import resample

from .test_trainer import quiet
from .worlds import D_IN, activations, build

DEAD = torch.tensor([3, 17, 40])


def trained(architecture: str):
    """An SAE with every per-latent parameter away from its initial value, and an optimiser with non-zero state."""
    sae = build(architecture, randomise=True)
    optimizer = torch.optim.AdamW(sae.parameters(), lr=1e-2, betas=(0.5, 0.999), weight_decay=0.0)
    for parameter in sae.parameters():
        parameter.grad = torch.rand_like(parameter) + 0.1
    optimizer.step()
    return sae, optimizer


def snapshot(sae, optimizer):
    tensors = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value.clone()
    return tensors


def test_only_dead_rows_and_their_moments_are_touched(architecture):
    sae, optimizer = trained(architecture)
    before = snapshot(sae, optimizer)
    revived = resample(sae, DEAD, torch.randn(100, 8), optimizer, generator=torch.Generator().manual_seed(0))
    after = snapshot(sae, optimizer)
    assert revived.tolist() == DEAD.tolist()
    per_latent = 0
    for name, new in after.items():
        old = before[name]
        if new.shape[:1] != (sae.config.d_sae,):
            assert torch.equal(new, old), name  # b_dec, its moments and the step counts
            continue
        per_latent += 1
        alive = torch.ones(len(new), dtype=torch.bool)
        alive[DEAD] = False
        assert torch.equal(new[alive], old[alive]), name
        assert not torch.equal(new[DEAD], old[DEAD]), name
        if ".exp_avg" in name:
            assert (new[DEAD] == 0).all() and (old[DEAD] != 0).all(), name
    assert per_latent >= (3 if sae.tied else 9)  # encoder, decoder, at least one bias, each with two moments


def test_state_that_cannot_be_reset_per_latent_is_kept_with_a_warning():
    sae, optimizer = trained("gated")
    codes = torch.full(sae.W_dec.shape, 7, dtype=torch.uint8)
    optimizer.state[sae.W_dec]["codes"] = codes
    with pytest.warns(
        UserWarning, match=r"torch.optim.adamw.AdamW has codes, which cannot be reset for single latents"
    ):
        resample(sae, DEAD, torch.randn(100, 8), optimizer)
    assert (codes == 7).all() and (optimizer.state[sae.W_dec]["exp_avg"][DEAD] == 0).all()


@pytest.mark.parametrize(
    "optim, said",
    [
        ("adamw_torch", None),
        ("adafactor", r"transformers.optimization.Adafactor has exp_avg_sq_col, exp_avg_sq_row, which"),
        (
            "adamw_bnb_8bit",
            r"bitsandbytes.optim.adamw.AdamW has absmax1, absmax2, qmap1, qmap2, state1, state2, which",
        ),
    ],
)
def test_a_run_warns_of_an_optimiser_that_is_reset_only_in_part(arguments, optim, said):
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    args = arguments(optim=optim, resample_steps=[5], dead_after_activations=1, recorded_activations=0)
    sae = build("gated", D_IN, 256)  # large enough for 8 bits
    sae.b_gate.data[:9] = -1e6
    trainer = quiet(SAETrainer(sae, args, activations(500, seed=0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in caught if "resampled latents keep the state" in str(each.message)]
    assert trainer.trainees[""].remedy.resampled >= 9
    assert len(told) == (0 if said is None else 1) and all(re.match(said, each) for each in told)


def test_both_encoders_of_an_untied_sae_read_the_new_direction():
    sae, _ = trained("gated_untied")
    resample(sae, DEAD, torch.randn(50, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.W_mag_T[DEAD], sae.W_enc_T[DEAD])


def test_a_resampled_latent_points_at_an_input_and_fires_on_it(architecture):
    sae, _ = trained(architecture)
    inputs = torch.randn(50, 8)
    resample(sae, DEAD, inputs, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(inputs - sae.b_dec, dim=-1)
    alive = torch.ones(sae.config.d_sae, dtype=torch.bool)
    alive[DEAD] = False
    loudness = 0.2 * sae.W_enc.T[alive].norm(dim=-1).mean()
    chosen = (sae.W_dec[DEAD] @ directions.T).argmax(-1)
    assert len(set(chosen.tolist())) == len(DEAD)  # drawn without replacement: no two latents start as twins
    torch.testing.assert_close(sae.W_dec[DEAD], directions[chosen])
    if not sae.tied:
        torch.testing.assert_close(sae.W_enc_T[DEAD], directions[chosen] * loudness)
    fresh = build(architecture)
    for name, parameter in sae.named_parameters():
        if parameter.shape == (sae.config.d_sae,):
            assert torch.equal(parameter[DEAD], dict(fresh.named_parameters())[name][DEAD]), name


def test_badly_reconstructed_inputs_are_preferred():
    sae = build("standard")
    torch.nn.init.zeros_(sae.W_dec)  # the error of an input is its squared norm
    inputs = torch.cat([torch.randn(1000, 8) * 0.1, torch.full((1, 8), 10.0)])
    for seed in range(5):
        resample(sae, DEAD[:1], inputs, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sae.W_dec[3], torch.full((8,), 8**-0.5))
        torch.nn.init.zeros_(sae.W_dec)


def test_no_more_latents_are_resampled_than_there_are_inputs():
    sae = build("gated", randomise=True)
    before = sae.W_dec.detach().clone()
    revived = resample(sae, DEAD, torch.randn(2, 8))
    assert revived.tolist() == DEAD[:2].tolist()
    assert torch.equal(sae.W_dec[40], before[40])
    assert resample(sae, DEAD, sae.b_dec.detach().expand(5, 8)).numel() == 0  # no input has a direction


def test_resampling_draws_from_its_own_generator_only():
    sae, _ = trained("gated")
    inputs = torch.randn(20, 8)
    state = torch.get_rng_state()
    resample(sae, DEAD, inputs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [1, 10])
def test_dead_latents_count_activations_since_they_fired(batch):
    dead = DeadLatents(3, dead_after=100)
    firing = torch.tensor([True, False, False])
    for _ in range(100 // batch):
        assert not dead.mask.any()
        dead.update(firing, batch)
        dead.advance()
    assert dead.silent_for.tolist() == [0, 100, 100]
    assert dead.mask.tolist() == [False, True, True]
    dead.reset_counters(torch.tensor([2]))
    assert dead.mask.tolist() == [False, True, False]
    dead.update(torch.tensor([False, True, False]), 1)
    dead.update(torch.tensor([False, False, False]), 0)
    assert dead.mask.tolist() == [False, True, False], "until the step is taken"
    dead.advance()
    assert dead.silent_for.tolist() == [1, 0, 1]
