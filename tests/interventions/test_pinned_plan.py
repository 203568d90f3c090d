"""A plan acts as it did when it was saved: with the same weights, or not at all."""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from hf_gated_sae import Ablate, Clamp, InterventionPlan, SAEModel, Splice
from hf_gated_sae.errors import CheckpointError, InputError, MissingFileError
from hf_gated_sae.formats import formats
from tests.hooks.support import make_sae
from tests.support.example_saes import example


@pytest.fixture
def folder(tmp_path):
    """An SAE on disk, beside which plans are saved."""
    make_sae().save_pretrained(tmp_path / "work" / "saes" / "a")
    return tmp_path / "work" / "saes" / "a"


def saved(sae, file):
    InterventionPlan([Clamp(sae, {3: 8.0}), Ablate(sae, [5])]).save(file)
    return json.loads(file.read_text())


# ------------------------------------------------------------------ what is on disk


def test_a_folder_is_pinned_by_the_hashes_of_its_files(folder, tmp_path):
    content = saved(SAEModel.from_pretrained(folder), tmp_path / "work" / "plan.json")
    [reference] = content["saes"]
    assert content["version"] == 2 and reference["revision"] is None
    assert reference["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("only_needed", [False, True])
def test_other_weights_in_the_folder_are_refused(folder, tmp_path, only_needed):
    file = tmp_path / "work" / "plan.json"
    saved(SAEModel.from_pretrained(folder), file)
    make_sae(seed=1).save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=r"not the one that the plan was saved with: for model.safetensors.*sha2"
    ):
        InterventionPlan.load(file, only_needed=only_needed)
    make_sae().save_pretrained(folder)
    assert len(InterventionPlan.load(file, only_needed=only_needed)) == 2


def test_another_configuration_in_the_folder_is_refused(folder, tmp_path):
    file = tmp_path / "work" / "plan.json"
    saved(SAEModel.from_pretrained(folder), file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "apply_b_dec_to_input": False}))
    with pytest.raises(CheckpointError, match=r"for config.json the plan pins sha256 .* build and save a new plan"):
        InterventionPlan.load(file)


def test_metrics_and_a_card_written_later_change_nothing(folder, tmp_path):
    file = tmp_path / "work" / "plan.json"
    saved(SAEModel.from_pretrained(folder), file)
    (folder / "sae_metrics.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    assert len(InterventionPlan.load(file)) == 2


def test_a_plan_and_its_sae_are_moved_together(folder, tmp_path, monkeypatch):
    file = tmp_path / "work" / "plans" / "plan.json"
    file.parent.mkdir()
    monkeypatch.chdir(tmp_path / "work")
    content = saved(SAEModel.from_pretrained("saes", "a"), file)
    assert (content["saes"][0]["repo"], content["saes"][0]["subfolder"]) == ("../saes", "a")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "work", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "elsewhere" / "moved" / "plans" / "plan.json"
    assert torch.equal(InterventionPlan.load(moved)[0].sae.W_dec, make_sae().W_dec)
    assert torch.equal(InterventionPlan.load(os.path.relpath(moved))[0].sae.W_dec, make_sae().W_dec)
    with pytest.raises(MissingFileError, match="no such folder"):
        InterventionPlan.from_dict(content)
    assert len(InterventionPlan.from_dict(content, folder=moved.parent)) == 2


def test_the_error_for_a_missing_sae_names_the_folder(folder, tmp_path):
    file = tmp_path / "work" / "plan.json"
    saved(SAEModel.from_pretrained(folder), file)
    shutil.move(file, tmp_path / "plan.json")
    with pytest.raises(MissingFileError, match=r"folder 'saes/a', relative to .*: put the SAE there"):
        InterventionPlan.load(tmp_path / "plan.json")


def test_a_folder_far_away_is_named_by_its_absolute_path(folder, tmp_path):
    far = tmp_path / "one" / "two" / "three" / "plan.json"
    far.parent.mkdir(parents=True)
    [reference] = saved(SAEModel.from_pretrained(folder), far)["saes"]
    assert Path(reference["repo"]) == folder.absolute()
    assert len(InterventionPlan.load(far)) == 2


def test_a_plan_of_the_first_version_still_loads(folder, tmp_path):
    content = InterventionPlan([Ablate(SAEModel.from_pretrained(folder), [3])]).to_dict()
    assert Path(content["saes"][0]["repo"]).is_absolute()
    del content["saes"][0]["files"]
    content["version"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert torch.equal(InterventionPlan.load(tmp_path / "plan.json")[0].sae.W_dec, make_sae().W_dec)


# ------------------------------------------------------------------ what is in memory


def trained(sae):
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    sae.training_loss(torch.randn(8, sae.config.d_in), sparsity_coefficient=0.1).total.backward()
    optimizer.step()


def through_data(sae):
    sae.W_dec.data[3] *= 2  # not counted by the tensor's version


def replaced(sae):
    sae.b_dec = torch.nn.Parameter(sae.b_dec + 1)


def recorded(sae):
    sae.record_statistics(torch.ones(64), torch.ones(64), 10)


def configured(sae):
    sae.config.apply_b_dec_to_input = not sae.config.apply_b_dec_to_input


@pytest.mark.parametrize("change", [trained, through_data, replaced, recorded, configured])
def test_an_sae_that_was_changed_is_refused(folder, tmp_path, change):
    sae = SAEModel.from_pretrained(folder)
    change(sae)
    file = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"GatedSAE in memory is not the one at .*differ in .*save_pretrained"):
        InterventionPlan([Clamp(sae, {3: 8.0})]).save(file)
    assert not file.exists()
    sae.save_pretrained(tmp_path / "changed")
    saved(SAEModel.from_pretrained(tmp_path / "changed"), file)
    again = InterventionPlan.load(file)[0].sae
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in sae.state_dict().items())


def test_weights_that_were_overwritten_on_disk_are_refused(folder, tmp_path):
    sae = SAEModel.from_pretrained(folder)
    make_sae(seed=1).save_pretrained(folder)
    with pytest.raises(InputError, match="is not the one at"):
        InterventionPlan([Clamp(sae, {3: 8.0})]).save(tmp_path / "plan.json")


def test_a_configuration_given_at_loading_is_not_lost(tmp_path):
    example("topk", k=4, site="resid_post.1").save_pretrained(tmp_path / "sae")
    sae = SAEModel.from_pretrained(tmp_path / "sae", k=2)
    with pytest.raises(InputError, match="config.k"):
        InterventionPlan([Splice(sae)]).save(tmp_path / "plan.json")


CASTS = {
    "as it is": lambda folder: SAEModel.from_pretrained(folder),
    "some latents": lambda folder: SAEModel.from_pretrained(folder, latents=[3, 5]),
    "loaded in another dtype": lambda folder: SAEModel.from_pretrained(folder, dtype=torch.bfloat16),
    "cast": lambda folder: SAEModel.from_pretrained(folder).to(torch.bfloat16),
    "cast to a wider dtype": lambda folder: SAEModel.from_pretrained(folder).double(),
    "copied": lambda folder: copy.deepcopy(SAEModel.from_pretrained(folder)),
    "frozen": lambda folder: SAEModel.from_pretrained(folder).requires_grad_(False),
    "at another site": lambda folder: SAEModel.from_pretrained(folder, site="resid_post.2"),
    "of another base model": lambda folder: SAEModel.from_pretrained(folder, base_model="someone/else"),
}


@pytest.mark.parametrize("case", CASTS)
@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_saes_with_unchanged_weights_are_saved(tmp_path, case, architecture):
    example(architecture, d_in=32, site="resid_post.1").save_pretrained(tmp_path / "sae")
    sae = CASTS[case](tmp_path / "sae")
    saved(sae, tmp_path / "plan.json")
    again = InterventionPlan.load(tmp_path / "plan.json")[0].sae
    assert (again.dtype, again.config.site) == (sae.dtype, sae.config.site)
    assert torch.equal(again.W_dec, sae.W_dec)


@pytest.mark.parametrize("name", sorted(set(formats) - {"temporal"}))  # no verb takes it
def test_every_layout_on_disk_can_be_pinned(name, tmp_path):
    for found in formats[name].examples(tmp_path)[:2]:
        path = tmp_path / found.repo
        sae = SAEModel.from_pretrained(path, found.address)
        if not sae.config.sites_read:
            sae = SAEModel.from_pretrained(path, found.address, site="resid_post.1")
        content = InterventionPlan([Splice(sae)]).to_dict()
        pinned = content["saes"][0]["files"]
        assert any(not file.endswith((".json", ".yaml")) for file in pinned), pinned
        assert len(InterventionPlan.from_dict(content)) == 1


# ------------------------------------------------------------------ the Hub


def test_an_sae_of_the_hub_is_compared_with_its_commit(hub, repo_id, cache_dir, tmp_path):
    make_sae().push_to_hub(repo_id)
    sae = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    some = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir, latents=[3])
    make_sae(seed=1).push_to_hub(repo_id)
    for each in (sae, some):
        InterventionPlan([Clamp(each, {3: 8.0})]).save(tmp_path / "plan.json")
        [reference] = json.loads((tmp_path / "plan.json").read_text())["saes"]
        assert (reference["repo"], reference["files"]) == (repo_id, None)
        assert reference["revision"] == sae.checkpoint.revision
    trained(sae)
    with pytest.raises(InputError, match="is not the one at"):
        InterventionPlan([Clamp(sae, {3: 8.0})]).save(tmp_path / "plan.json")
