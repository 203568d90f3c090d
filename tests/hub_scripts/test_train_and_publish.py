"""From a model and a text to a published SAE with measured numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hf_gated_sae import SAEModel, evaluate
from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import SAEError
from hf_gated_sae.publishing import read_facts
from hub_scripts.demo_assets.language_model import load_language_model
from tests.support.hub_state import commits, files
from tests.support.mini_hub import MiniHub, read_card

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "hub_scripts" / "train_and_publish.py"
FLAGS = (
    *("--sae.site", "resid_post.1", "--sae.d_sae", "64", "--model.hub_id", "me/python-lm", "--seed", "1"),
    *("--data.context_length", "32", "--data.sequences_per_batch", "8", "--data.buffer_size", "512"),
    *("--training.max_steps", "20", "--training.activation_batch_size", "128", "--training.use_cpu"),
    *("--training.statistics_activations", "500", "--training.recorded_activations", "500"),
)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Text to train on, and held-out text, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for split, name in (("training", "train.txt"), ("held_out", "held_out.txt")):
        Path(name).write_text("\n".join(corpus.texts(split, 40_000)), encoding="utf-8")
    return "train.txt", "held_out.txt"


def run(*words: str) -> str:
    """Run the script, raise what it raises, and return what it prints."""
    spec = importlib.util.spec_from_file_location("train_and_publish", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = CliRunner().invoke(module.app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_commit_with_card_and_held_out_numbers(hub: MiniHub, repo_id: str, texts, cache_dir: str) -> None:
    said = run(str(bundled.MODEL), *texts, repo_id, "--license", "mit", "--tokens", "2048", *FLAGS)
    assert "loss recovered" in said and f"published as {repo_id}" in said
    assert len(commits(hub, repo_id)) == 1
    there = files(hub, repo_id)
    assert {"config.json", "model.safetensors", "sae_metrics.json", "README.md"} <= set(there)
    assert not [name for name in there if name.endswith((".bin", ".pt")) or "checkpoint" in name]
    card = read_card(there["README.md"].decode())
    assert card["license"] == "mit" and card["base_model"] == "me/python-lm"

    sae = SAEModel.from_pretrained(repo_id, cache_dir=cache_dir)
    facts = read_facts(sae)
    assert facts.evaluation["dataset"] == "held_out.txt" and facts.evaluation["context length"] == 32
    assert facts.training["steps"] == 20 and facts.provenance["data"] == "train.txt"
    assert str(Path.cwd()) not in there["README.md"].decode() + there["sae_metrics.json"].decode()

    # The numbers are those of the published weights on the held-out text.
    model, tokenizer = load_language_model(bundled.MODEL)
    ids = tokenizer(Path("held_out.txt").read_text(), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    rows = ids[: 64 * 31].view(64, 31)
    bos = rows.new_full((64, 1), tokenizer.bos_token_id)
    report = evaluate(model, sae, [torch.cat([bos, rows], -1)])
    assert facts.metrics["l0"] == pytest.approx(report.metrics.l0, rel=1e-4)
    assert facts.metrics["loss_recovered"] == pytest.approx(report.loss_recovered, rel=1e-3)


def test_an_unknown_licence_is_refused_before_training(hub: MiniHub, repo_id: str, texts) -> None:
    hub.requests.clear()
    with pytest.raises(SAEError, match="Did you mean 'apache-2.0'"):
        run(str(bundled.MODEL), *texts, repo_id, "--license", "apche-2.0", *FLAGS)
    assert hub.requests == [] and not Path(repo_id.split("/")[1]).exists()


def test_several_saes_go_into_folders(hub: MiniHub, repo_id: str, texts) -> None:
    saes = "{small: {d_sae: 16}, other: {site: mlp_out.2}}"
    run(str(bundled.MODEL), *texts, repo_id, "--subfolder", "set", "--tokens", "512", "--saes", saes, *FLAGS)
    assert {"set/small/config.json", "set/other/config.json", "README.md"} <= set(files(hub, repo_id))


def test_nothing_is_published_without_held_out_text(hub: MiniHub, repo_id: str, texts) -> None:
    with pytest.raises(SAEError, match="nowhere.txt"):
        run(str(bundled.MODEL), "train.txt", "./nowhere.txt", repo_id, *FLAGS)
    assert not Path(repo_id.split("/")[-1]).exists(), "the training would have been in vain"
    with pytest.raises(SAEError, match="Unknown key"):
        run(str(bundled.MODEL), *texts, repo_id, *FLAGS, "--sae.widht", "3")


def test_obstacles_to_publishing_are_reported_before_training(hub: MiniHub, repo_id: str, texts) -> None:
    Path("empty.txt").write_text("")
    with pytest.raises(SAEError, match="empty"):
        run(str(bundled.MODEL), "train.txt", "empty.txt", repo_id, *FLAGS)
    with pytest.raises(SAEError, match="expected 'owner/name'"):
        run(str(bundled.MODEL), *texts, "me/no such name!", *FLAGS)
    with pytest.raises(SAEError, match="cannot be written to with this token"):
        run(str(bundled.MODEL), *texts, "somebody-else/sae", *FLAGS)
    with pytest.raises(SAEError, match="is a transcoder: it reads resid_post.1 .* and writes mlp_out.2"):
        run(str(bundled.MODEL), *texts, repo_id, *FLAGS, "--sae.site_out", "mlp_out.2")
    assert not [path for path in Path().iterdir() if path.is_dir()], "nothing was trained"
    assert not HfApi().repo_exists(repo_id)
