"""The demo shows what it claims, on the bundled pair and on any other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_gated_sae import GatedSAE, GatedSAEConfig, SAEModel
from hf_gated_sae.demo import bundled
from hf_gated_sae.demo.demo_run import DemoPlan, run_demo
from hf_gated_sae.demo.effects import SteeringPlan
from hf_gated_sae.demo.effort import QUICK, THOROUGH, Effort, effort_for
from hf_gated_sae.errors import AttachError, InputError, MissingFileError, UnknownNameError
from hf_gated_sae.hooks.dispatch import _dispatchers

pytestmark = pytest.mark.slow

SMALL = SteeringPlan(prompts=8, new_tokens=48)
EFFORT = Effort(tokens=24 * 256, candidates=10, choosing=SteeringPlan(prompts=8, new_tokens=40), showing=SMALL)


def run(**plan):
    return run_demo(DemoPlan(**{"effort": EFFORT, **plan}), lambda *step: None)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The demo as the command runs it."""
    return run_demo(DemoPlan(out=tmp_path_factory.mktemp("published")), lambda *step: None)


def test_the_splice_keeps_most_of_the_loss(report):
    found = report.fidelity
    assert found.loss_clean < found.loss_spliced < found.loss_zero_ablated
    assert found.loss_recovered > 0.9 and found.metrics.l0 < 40


def test_ablating_hurts_inside_the_concept_more_than_outside(report):
    effect = report.ablation
    inside = effect.inside_ablated - effect.inside_clean
    outside = effect.outside_ablated - effect.outside_clean
    assert inside > 5 * abs(outside) and inside > 0


def test_steering_raises_the_share_of_the_concept(report):
    before, after = report.steering.share_before, report.steering.share_after
    assert after > 2 * before and after > before + 0.1
    shown = report.steering.clearest
    assert shown.before != shown.after and shown in report.steering.continuations


def test_the_sae_is_published_with_its_card_and_comes_back(report):
    assert report.identical
    assert {"README.md", "config.json", "model.safetensors", "sae_metrics.json"} <= set(report.files)
    assert "loss_recovered" in (report.published / "README.md").read_text(encoding="utf-8")


def test_nothing_stays_attached(report):
    assert not _dispatchers


def test_another_sae_and_plain_text(tmp_path):
    """Text other than Python has no ground truth, so the target is where the latent itself fires."""
    torch.manual_seed(1)
    sae = GatedSAE(GatedSAEConfig(d_in=128, d_sae=256, site="resid_post.1"))
    sae.save_pretrained(tmp_path / "sae")
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 300, encoding="utf-8")
    found = run(model=str(bundled.MODEL), sae=str(tmp_path / "sae"), text=text, tokens=6 * 256, latent=3)
    assert found.target.latent == 3 and "latent 3 fires" in found.target.name
    assert found.fidelity.metrics.tokens > 0


@pytest.mark.parametrize(
    ("plan", "error", "phrase"),
    [
        ({"model": "nobody/nothing"}, InputError, "without --sae"),
        ({"model": "nobody/nothing", "sae": "nobody/nothing"}, MissingFileError, "nobody/nothing"),
        ({"sae": "no/such/folder"}, MissingFileError, "no/such/folder"),
        ({"subfolder": "resid_post.1/gatd"}, MissingFileError, "resid_post.1/gated"),
        ({"text": Path("no.txt")}, MissingFileError, "no.txt"),
        ({"concept": "coment"}, UnknownNameError, "comment"),
        ({"concept": "comment", "latent": 3}, InputError, "--latent"),
        ({"latent": 10**6}, IndexError, "d_sae"),
    ],
)
def test_wrong_plans_are_refused_in_a_sentence(plan, error, phrase):
    with pytest.raises(error, match=phrase):
        run(**plan)


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="shorter than one window"):
        run(text=tmp_path / "empty.txt")


def test_a_demo_without_effect_fails(tmp_path):
    with pytest.raises(AttachError, match="no effect: 0 of 2 continuations changed"):
        run(latent=484, strength=1e-9, tokens=1024, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_effort_depends_on_the_model_and_the_options():
    class Model:
        def __init__(self, parameters):
            self.num_parameters = lambda: parameters

    assert effort_for(Model(1_000_000)) is THOROUGH and effort_for(Model(135_000_000)) is QUICK
    assert run(latent=484, strength=2.0, tokens=1024).fidelity.metrics.tokens <= 1024


def test_the_choice_is_made_once_for_each_candidate_and_strength():
    told = []
    run_demo(DemoPlan(effort=EFFORT, concept="comment", tokens=2048), lambda *step: told.append(step))
    trials = [step for step, number, total in told if "trials of steering" in step]
    assert trials == [f"find the latent: {done} of 10 trials of steering" for done in range(10)]
    assert {(number, total) for _, number, total in told} == {(number, 7) for number in range(1, 8)}


def test_the_bundled_files_meet_their_limits():
    """The recorded metrics of the stored weights are within the limits that they were built for."""
    assert sum(path.stat().st_size for path in bundled.ASSETS.rglob("*.safetensors")) <= 8_000_000
    facts = json.loads((bundled.MODEL / "training.json").read_text(encoding="utf-8"))
    assert facts["held_out"]["share_of_unigram"] < 0.6
    folders = sorted(path.parent for path in bundled.SAES.rglob("config.json"))
    assert {path.name for path in folders} == {"gated", "standard"}
    for folder in folders:
        sae = SAEModel.from_pretrained(folder)
        metrics = json.loads((folder / "sae_metrics.json").read_text(encoding="utf-8"))["metrics"]
        assert sae.config.recorded_tokens > 0 and str(folder.parent.name) == sae.config.site
        if folder.name == "gated":
            assert 0.98 <= metrics["relative_reconstruction_bias"] <= 1.02
            assert metrics["dead_fraction"] < 0.1 and metrics["l0"] <= 32
            assert metrics["loss_recovered"] >= (0.95 if "resid_post" in sae.config.site else 0.85)


def test_the_command_runs_and_its_errors_are_one_line(tmp_path):
    command = [sys.executable, "-c", "from hf_gated_sae.cli import main; main()", "demo"]
    quick = ["--tokens", "1024", "--latent", "484", "--strength", "2", "--out", str(tmp_path / "out")]
    good = subprocess.run([*command, *quick], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    for phrase in (
        "zero-ablated",
        "recovered",
        "gamma",
        "Ablate latent",
        "before:",
        "after:",
        "every tensor identical",
    ):
        assert phrase in good.stdout
    assert str(tmp_path) in good.stdout.replace("\n", "")
    bad = subprocess.run([*command, "--concept", "coment"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and bad.stderr.startswith("error: Unknown concept 'coment'. Did you mean 'comment'")
    assert "Traceback" not in bad.stderr
