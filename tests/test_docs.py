"""The code in the documentation runs, page by page and in order, with the loopback Hub."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from hf_gated_sae.cli import main
from hf_gated_sae.demo import bundled, corpus
from tests.support.documents import assert_edits, blocks, run
from tests.support.gpt2_small import seed_gpt2_small

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_coming_from_saelens_or_neuronpedia(hub, tmp_path, monkeypatch, capsys):
    seed_gpt2_small(hub, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "coming-from.md", tmp_path)
    sae, latents = names["sae"], names["latents"]
    assert (sae.config.site, sae.config.base_model) == ("resid_pre.8", "openai-community/gpt2")
    assert torch.equal(latents, sae.encode(names["x"])) and latents.any()
    plain = names["model"](**names["batch"]).logits
    assert not torch.allclose(names["logits"], plain) and not torch.allclose(names["ablated"], plain)
    assert "of the loss recovered at L0" in capsys.readouterr().out
    assert len(names["written"][0]) == names["prompt"]["input_ids"].shape[1] + 8


def test_get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "get.md", tmp_path)
    assert names["latents"].shape == (*names["x"].shape[:2], 1024)
    assert names["some"].config.kept_latents and names["mine"].config.site == "resid_post.1"


def test_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "use.md", tmp_path)
    assert_edits(names)
    assert len(names["found"].top(3)) == 3 and names["logits"].shape[-1] == 1024


def test_sites(tmp_path, monkeypatch):
    names = run(DOCS / "sites.md", tmp_path)
    assert str(names["read_name"]("model.layers.1")) == str(names["read_name"]("blocks.1.hook_resid_post"))


def test_measure(tmp_path, monkeypatch):
    names = run(DOCS / "measure.md", tmp_path)
    report = names["report"]
    assert 0.5 < report.loss_recovered <= 1.05
    assert report.metrics.tokens + report.metrics.outliers + report.tokens_left_out == names["ids"].numel()
    assert names["sae"].max_activation[484] == report.max_activation[484]  # record=True put it there
    [best] = names["scores"].best("function_name")
    assert best.latent == 293 and best.f1 > 5 * best.chance_f1


def test_publish(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "publish.md", tmp_path)
    assert all((names["again"].state_dict()[key] == value).all() for key, value in names["sae"].state_dict().items())
    recovered = f"{names['facts'].metrics['loss_recovered']:.3f}"[:4]
    assert recovered in names["card"] and "license: apache-2.0" in names["card"]
    exactly = names["SAEModel"].from_pretrained("alice/my-saes", "resid_post.1", revision=names["commit"].oid)
    assert exactly.checkpoint.revision == names["commit"].oid


def test_how_sites_are_proven(tmp_path):
    names = run(DOCS / "how-sites-are-proven.md", tmp_path)
    assert len(names["forwards"]) == 10
    assert names["sites"].names()[:4] == ["embed", "resid_pre.0", "attn_in.0", "attn_z.0"]
    assert names["resolve"](names["model"]) is names["sites"]


def test_the_training_run_trains_and_is_resumed(tmp_path, monkeypatch, capsys):
    [settings], [code] = blocks(DOCS / "train.md", "yaml"), blocks(DOCS / "train.md", "bash")
    commands = [shlex.split(line, comments=True) for line in code.splitlines()]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(settings.replace("openai-community/gpt2", str(bundled.MODEL)), encoding="utf-8")
    (tmp_path / "book.txt").write_text("\n".join(corpus.texts("held_out", 30_000)), encoding="utf-8")
    small = (
        "--sae.site resid_post.1 --sae.expansion_factor 1 --data.buffer_size 256 --training.activation_batch_size 64"
    )
    small += " --model.hub_id openai-community/gpt2"  # a local folder does not state it
    small += " --training.max_steps 4 --training.save_steps 2 --training.recorded_activations 100 --training.use_cpu"
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*command, *small.split(), "--training.statistics_activations", "100"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        for file in (tmp_path / "gpt2-sae" / "checkpoint-4").glob("*"):
            file.unlink()  # as if it had crashed
    said = "".join(capsys.readouterr())
    assert "tokens per second" in said and "from the beginning" in said and "from checkpoint-2" in said
    assert (tmp_path / "gpt2-sae" / "README.md").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_files_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:hf_gated_sae|hub_scripts|model_cards|tests)/[\w/.-]*)`", text):
        assert (DOCS.parent / name).exists(), name
