"""The bundled SAEs: their recorded metrics are right, and good enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.evaluation import FidelityReport, evaluate
from hf_gated_sae.publishing import read_facts
from hub_scripts.demo_assets import dictionaries, dictionary_report, language_model
from hub_scripts.demo_assets.dictionaries import RECIPES, DictionaryRecipe

pytestmark = pytest.mark.slow

NAMES = [recipe.name for recipe in RECIPES]
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def facts_of(name: str) -> dict:
    return json.loads(dictionary_report.facts_file(dictionaries.ASSETS / name).read_text())


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return language_model.load_language_model()


@pytest.fixture(scope="module")
def material(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    return dictionary_report.held_out_material(tokenizer, model.config.max_position_embeddings)


def test_every_recipe_has_its_sae():
    assert [folder.relative_to(dictionaries.ASSETS).as_posix() for folder in dictionaries.folders()] == NAMES
    for name, recipe in BY_NAME.items():
        config = SAEModel.from_pretrained(dictionaries.ASSETS / name).config
        assert (config.architecture, config.d_sae, config.site) == (recipe.architecture, recipe.d_sae, recipe.site)
        assert config.base_model == dictionaries.BASE_MODEL and config.recorded_tokens > 100_000


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("/gated")])
def test_gated_saes_meet_the_limits(name):
    assert dictionary_report.is_good_enough(facts_of(name)) == []


@pytest.mark.parametrize("site", sorted({recipe.site for recipe in RECIPES}))
def test_the_baseline_shrinks_at_comparable_sparsity(site):
    gated = FidelityReport.from_dict(facts_of(f"{site}/gated")["fidelity"])
    baseline = FidelityReport.from_dict(facts_of(f"{site}/standard")["fidelity"])
    assert baseline.d_sae == 1.5 * gated.d_sae
    assert baseline.metrics.l0 == pytest.approx(gated.metrics.l0, rel=0.2)
    # Losses are not compared: at this tolerance the sparser of the two would be at a disadvantage.
    assert baseline.metrics.relative_reconstruction_bias < 0.9 < gated.metrics.relative_reconstruction_bias


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_match_the_stored_weights(name, model_and_tokenizer, material):
    """On a part of the text the numbers vary, but a stale or wrong file would be far off."""
    sae = SAEModel.from_pretrained(dictionaries.ASSETS / name)
    part = list(material.batches())[::8]
    report, stored = evaluate(model_and_tokenizer[0], sae, part), FidelityReport.from_dict(facts_of(name)["fidelity"])
    assert report.metrics.l0 == pytest.approx(stored.metrics.l0, rel=0.1)
    assert report.metrics.fvu == pytest.approx(stored.metrics.fvu, rel=0.1)
    assert report.loss_recovered == pytest.approx(stored.loss_recovered, abs=0.02)
    gamma = report.metrics.relative_reconstruction_bias
    assert gamma == pytest.approx(stored.metrics.relative_reconstruction_bias, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_measured_and_beat_the_base_rate(name):
    facts = facts_of(name)
    labels = read_facts(dictionaries.ASSETS / name).labels
    assert len(labels) >= 5
    scores = {(s["latent"], s["concept"]): s for found in facts["concepts"].values() for s in found["best"]}
    for label in labels:
        score = scores[label.latent, label.label.split(" ")[0]]
        assert (label.precision, label.recall) == (score["precision"], score["recall"])
        assert score["correlation"] >= dictionary_report.KNOWN_FROM
        assert score["f1"] > score["chance_f1"] and score["precision"] > 1.5 * score["prevalence"]


@pytest.mark.parametrize("name", NAMES)
def test_assets_name_no_machine(name):
    for file in (dictionaries.ASSETS / name).rglob("*"):
        content = file.read_bytes()
        for private in (str(Path.home()), str(Path.cwd()), "/work/", "/tmp/"):
            assert private.encode() not in content, file


def test_the_shipped_weights_stay_small():
    assets = dictionaries.ASSETS.parent
    assert sum(file.stat().st_size for file in assets.rglob("*.safetensors")) < 8e6


def test_a_recipe_trains_an_sae_reproducibly():
    recipe = DictionaryRecipe("resid_post.1", "gated", 16, sparsity_coefficient=0.5, steps=40, batch_size=64)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).half()
    seen: list[int] = []
    first = dictionaries.train_dictionary(recipe, x, lambda step, logs: seen.append(step))
    torch.manual_seed(123)
    second = dictionaries.train_dictionary(recipe, x)
    assert sorted(set(seen)) == list(range(1, 41))
    assert first.config.site == "resid_post.1" and first.config.base_model == dictionaries.BASE_MODEL
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
