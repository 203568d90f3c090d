"""Several SAEs from one stream, and transcoders."""

from __future__ import annotations

import json

import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError, UnknownNameError
from hf_gated_sae.training import ModelActivations, SAETrainer, TensorActivations
from tests.support.tiny_models import tiny_model

from .test_trainer import measured, quiet
from .worlds import D_IN, activations, build

pytestmark = pytest.mark.slow

OTHER = 20
SITES = {"site": "resid_post.0", "site_out": "mlp_out.1"}


def two_sites(seed: int = 0):
    x = activations(2000, seed=seed)
    mix = torch.randn(D_IN, OTHER, generator=torch.Generator().manual_seed(5)) * 0.3
    return {"resid_post.0": x, "mlp_out.1": torch.relu(x @ mix) + 3}


def four():
    """Return four SAEs that differ in sites, width, architecture or dead latents."""
    saes = {
        "gated": build("gated", D_IN, site="resid_post.0"),
        "wide": build("gated", D_IN, 64, site="resid_post.0"),
        "out/topk": build("topk", OTHER, site="mlp_out.1"),
        "across": build("standard", D_IN, d_out=OTHER, apply_b_dec_to_input=False, **SITES),
    }
    saes["wide"].b_gate.data[:5] = -1e6
    return saes


SETTINGS = {
    "max_steps": 25,
    "resample_steps": [12, 20],
    "dead_after_activations": 300,
    "lr_dip_steps": 5,
    "warmup_steps": 5,
    "max_grad_norm": 0.5,
}
COEFFICIENTS = {"gated": 0.5, "wide": 1.0, "out/topk": 0.0, "across": 2.0}


def test_every_sae_is_trained_as_if_it_were_alone(arguments):
    together = four()
    args = arguments(sparsity_coefficient=COEFFICIENTS, **SETTINGS)
    trainer = quiet(SAETrainer(together, args, TensorActivations(two_sites(), seed=1)))
    trainer.train()
    alone = four()
    for name, sae in alone.items():
        args = arguments(sparsity_coefficient=COEFFICIENTS[name], **SETTINGS)
        quiet(SAETrainer(sae, args, TensorActivations(two_sites(), seed=1))).train()
        for key, tensor in sae.state_dict().items():
            assert torch.equal(together[name].state_dict()[key], tensor), (name, key)
        assert not torch.equal(sae.W_dec, four()[name].W_dec)
    assert trainer.trainees["wide"].remedy.resampled >= 5
    assert len({trainer.trainees[name].dip.since for name in ("wide", "gated")}) == 2  # each has its own dip


def test_each_sae_is_logged_and_saved_under_its_name(arguments, tmp_path):
    args = arguments(max_steps=10, sparsity_coefficient=COEFFICIENTS, logging_steps=1)
    trainer = quiet(SAETrainer(four(), args, TensorActivations(two_sites())))
    trainer.train()
    [*_, last] = [entry for entry in trainer.state.log_history if "loss" in entry]
    total = 0.0
    for name in four():
        assert {f"{name}/l0", f"{name}/fvu", f"{name}/dead_latents", f"{name}/relative_reconstruction_bias"} <= set(
            last
        )
        total += last[f"{name}/loss"]
        loaded = SAEModel.from_pretrained(tmp_path / "run" / name)
        assert torch.equal(loaded.W_dec, trainer.trainees[name].sae.W_dec)
        facts = json.loads((tmp_path / "run" / name / "training_facts.json").read_text())
        assert facts["training"]["sparsity_coefficient"] == COEFFICIENTS[name]
    assert total == pytest.approx(last["loss"], rel=1e-4) != 0


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_learns_to_write_from_what_it_reads(arguments, architecture, skip):
    data, held_out = two_sites(), two_sites(seed=7)
    settings = {"skip_connection": True} if skip else {}
    kind = architectures[architecture]
    if kind.tied:
        pytest.skip("a tied SAE reads and writes the same site")
    scale = "sqrt_d_in" if kind.homogeneous else "none"
    sae = build(architecture, D_IN, d_out=OTHER, apply_b_dec_to_input=False, **SITES, **settings)
    args = arguments(
        max_steps=80, learning_rate=1e-2, activation_scale=scale, sparsity_coefficient=0.01, activation_batch_size=128
    )
    quiet(SAETrainer(sae, args, TensorActivations(data))).train()
    x, y = held_out["resid_post.0"], held_out["mlp_out.1"]
    with torch.no_grad():
        error = (y - sae(x).reconstruction).square().sum() / (y - y.mean(0)).square().sum()
    assert error < 0.95, error  # 1 if no latent is active
    assert sae.config.recorded_fvu == pytest.approx(float(error), abs=0.1)


@pytest.mark.parametrize("skip", [False, True])
def test_the_units_of_both_sites_do_not_matter_to_a_transcoder(arguments, skip):
    """The same run on activations in other units gives the same transcoder in those units."""
    written = []
    for read, write in ((1.0, 1.0), (1000.0, 0.01)):
        data = {"resid_post.0": two_sites()["resid_post.0"] * read, "mlp_out.1": two_sites()["mlp_out.1"] * write}
        sae = build("gated", D_IN, d_out=OTHER, apply_b_dec_to_input=False, skip_connection=skip, **SITES)
        quiet(SAETrainer(sae, arguments(max_steps=20), TensorActivations(data))).train()
        written.append(sae(read * activations(50, seed=3)).reconstruction.detach() / write)
    torch.testing.assert_close(*written, rtol=1e-3, atol=1e-3)


def test_a_transcoder_on_a_language_model(arguments):
    model = tiny_model("llama")
    batches = list(torch.randint(3, 97, (8, 4, 16), generator=torch.Generator().manual_seed(0)))
    stream = ModelActivations(model, ["mlp_in.1", "mlp_out.1"], batches, buffer_size=256)
    sae = build("gated", 32, apply_b_dec_to_input=False, site="mlp_in.1", site_out="mlp_out.1")
    quiet(SAETrainer(sae, arguments(max_steps=60, sparsity_coefficient=0.1), stream)).train()
    assert sae.config.recorded_fvu < 0.95


def test_saes_that_do_not_fit_the_stream_are_explained(arguments):
    stream = TensorActivations(two_sites())
    with pytest.raises(UnknownNameError, match="Did you mean 'resid_post.0'"):
        SAETrainer(build("gated", D_IN, site="resid_post.1"), arguments(), stream)
    across = build("gated", D_IN, site="resid_post.0", site_out="mlp_out.1")
    with pytest.raises(InputError, match="the same activations for both"):
        SAETrainer(across, arguments(), activations(500, seed=0))
    with pytest.raises(InputError, match="apply_b_dec_to_input=False"):
        SAETrainer(across, arguments(), stream)
    SAETrainer(across, arguments(activation_scale="none"), stream)


def test_settings_by_name_must_name_the_saes(arguments):
    stream = TensorActivations(two_sites())
    pair = {"a": build("gated", D_IN, site="resid_post.0"), "b": build("standard", D_IN, site="resid_post.0")}
    with pytest.raises(UnknownNameError, match="Unknown SAE 'c'"):
        SAETrainer(pair, arguments(sparsity_coefficient={"a": 1.0, "b": 1.0, "c": 1.0}), stream)
    with pytest.raises(UnknownNameError, match="without a sparsity_coefficient: 'b'"):
        SAETrainer(pair, arguments(sparsity_coefficient={"a": 1.0}), stream)
    with pytest.raises(UnknownNameError, match="'frozen_decoder'"):
        SAETrainer(pair, arguments(objective={"frozen_decoder": False}), stream)
    trainer = SAETrainer(pair, arguments(objective={"a": {"frozen_decoder": False}}), stream)
    assert trainer.trainees["a"].objective.frozen_decoder is False
    for names in ({"../a": pair["a"]}, {"checkpoint-3": pair["a"]}, {"": pair["a"]}, {}):
        with pytest.raises(InputError, match="expected"):
            SAETrainer(names, arguments(), stream)
    with pytest.raises(InputError, match="each of them once"):
        SAETrainer({"a": pair["a"], "b": pair["a"]}, arguments(), stream)


def test_a_bare_tensor_fits_any_site(arguments):
    x = activations(1000, seed=0)
    sae = build("gated", D_IN, site="resid_post.3")
    quiet(SAETrainer(sae, arguments(max_steps=20), x)).train()
    assert measured(sae, x).fvu < 1


def test_a_new_skip_connection_writes_nothing():
    torch.full((OTHER, D_IN), 7.0)  # so that reused memory would not be zero
    sae = build("gated", D_IN, d_out=OTHER, apply_b_dec_to_input=False, skip_connection=True, **SITES)
    assert torch.equal(sae.W_skip, torch.zeros(OTHER, D_IN))
