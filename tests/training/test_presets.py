"""Presets are complete, state their source and units, and can be trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_gated_sae.errors import UnknownNameError
from hf_gated_sae.training import SAETrainer, TensorActivations
from hf_gated_sae.training.presets import presets
from hf_gated_sae.training.run import assemble, plain
from hf_gated_sae.training.run.assembly import arguments
from hf_gated_sae.training.run.run_parts import new_saes

pytestmark = pytest.mark.slow

SMALL = {
    **{"max_steps": 3, "activation_batch_size": 32, "statistics_activations": 128, "recorded_activations": 128},
    **{"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
}


def run_of(preset: str, folder: Path, **training: object) -> dict:
    return {
        "output_dir": str(folder),
        "model": {"name": "not loaded"},
        "data": {"files": "not read"},
        "preset": preset,
        "sae": {"site": "resid_post.0", "d_sae": 48},
        "training": {**SMALL, **training},
    }


def test_names_of_presets() -> None:
    assert {
        "gated-paper",
        "baseline-paper",
        "gated-modern",
        "jumprelu-gemma-scope",
        "topk",
        "batch-topk",
        "matryoshka",
    } <= {*presets}
    with pytest.raises(UnknownNameError, match="Did you mean 'gated-paper'"):
        presets["gated-papr"]


@pytest.mark.parametrize("name", presets)
def test_a_tiny_sae_is_trained_with_each_preset(name: str, tmp_path: Path) -> None:
    config = assemble(run_of(name, tmp_path / "run"))
    [sae] = new_saes(config, {"resid_post.0": 16}, {}, torch.device("cpu")).values()
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    SAETrainer(sae, arguments(config), TensorActivations(torch.randn(256, 16))).train()
    after = sae.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    for key in ("W_dec", "W_enc_T"):
        assert not torch.equal(after[key], before[key])
    assert type(sae).config_class.model_type.removesuffix("_sae") == presets[name].sae["architecture"]


@pytest.mark.parametrize("name", presets)
def test_a_preset_states_its_source_and_units(name: str) -> None:
    preset = presets[name]
    assert "arXiv" in preset.source or "Anthropic" in preset.source
    assert "width" in preset.units and ("lambda" in preset.units)
    for stated in ("max_steps", "learning_rate", "adam_beta1", "adam_beta2", "activation_scale", "unit_norm_decoder"):
        assert stated in preset.training, stated


def test_settings_of_a_preset_can_be_overridden(tmp_path: Path) -> None:
    given = run_of("gated-paper", tmp_path, learning_rate=1e-4, resample_steps=[1])
    args = arguments(assemble(given))
    assert (args.learning_rate, args.resample_steps, args.adam_beta1) == (1e-4, [1], 0.0)
    given["training"]["dead_latent_remedy"] = None
    del given["training"]["resample_steps"]  # the steps of the preset are dropped with its remedy
    assert arguments(assemble(given)).dead_latent_remedy is None


def test_the_recipe_of_the_paper(tmp_path: Path) -> None:
    args = arguments(assemble(run_of("gated-paper", tmp_path) | {"training": {"use_cpu": True}}))
    assert (args.adam_beta1, args.adam_beta2, args.learning_rate) == (0.0, 0.999, 3e-4)
    assert (args.max_steps, args.activation_batch_size, args.warmup_steps) == (300_000, 4096, 1000)
    assert args.resample_steps == [25_000, 50_000, 75_000, 100_000]
    assert args.dead_after_activations == 12_500 * 4096
    assert args.unit_norm_decoder and args.activation_scale == "none" and args.lr_dip == 0.1


def test_shares_follow_the_length_of_the_run(tmp_path: Path) -> None:
    short = arguments(assemble(run_of("gated-modern", tmp_path, max_steps=2000)))
    assert (short.warmup_steps, short.sparsity_warmup_steps) == (20, 100)
    assert short.lr_scheduler_kwargs == {"num_decay_steps": 400, "decay_type": "linear"}


@pytest.mark.parametrize("name", presets)
def test_a_written_run_has_all_settings_of_its_preset(name: str, tmp_path: Path) -> None:
    config = assemble(run_of(name, tmp_path))
    written = plain(config)
    assert "preset" not in written
    again = assemble(written)
    assert plain(again) == written
    assert arguments(again).recipe() == arguments(config).recipe()
    assert math.isclose(written["training"]["learning_rate"], presets[name].training["learning_rate"])
