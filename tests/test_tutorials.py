"""The code in the tutorials runs and gives the results that their text states, with the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from tests.support.documents import run

pytestmark = pytest.mark.slow

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def test_researcher(tmp_path):
    names = run(TUTORIALS / "researcher.md", tmp_path)
    assert names["candidates"] == [898, 240, 568, 66, 905]
    assert names["ranked"]("gradient").index(898) == 1023
    assert names["clean"] > 0.99 and min(names["controls"]) > 0.99
    assert names["without_one"] == pytest.approx([0.173, 0.697, 0.982, 0.990, 0.993], abs=0.01)
    assert names["without_two"] < 0.01
    assert names["steered"] > 0.7 > 0.01 > max(names["expected"], names["steered_randomly"])
    brackets = [names["brackets"](latent) for latent in (898, 240)]
    assert brackets == pytest.approx([0.96, 0.5], abs=0.02)
    assert names["change"][898] == pytest.approx((3.01, 0.17), abs=0.02)
    assert names["change"][240] == pytest.approx((0.85, 0.001), abs=0.005)
    for context, found in (("\n\n__all__ = [", 898), ("\n\ndef sub_debug(", 240)):
        assert context in names["contexts"][found][:3]


def test_publisher(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    names = run(TUTORIALS / "publisher.md", tmp_path)
    report, longer = names["report"], names["longer"]
    assert report.loss_recovered == pytest.approx(0.80, abs=0.05) and longer.loss_recovered > 0.95
    assert report.metrics.l0 > 60 and longer.metrics.l0 < 10
    assert names["theirs"].checkpoint.revision == names["commit"].oid
    card = hf_hub_download("alice/my-saes", "resid_post.1/gated/README.md")
    text = Path(card).read_text(encoding="utf-8")
    assert f"{report.loss_recovered:.4f}"[:5] in text and "bundled, trained longer" in text
    assert names["known"].curve and names["facts"].training["steps"]


def test_engineer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(TUTORIALS / "engineer.md", tmp_path)
    steered, capped = names["handle"].report().interventions
    assert steered.positions[0] and not steered.positions.get(1)
    assert "Steer resid_post.1" in capsys.readouterr().out
    assert (names["written"] != names["plain"]).any()
    assert "mine" in names["refusal"] or "gated" in names["refusal"]
    assert all(each.sae_used.config.kept_latents for each in names["pinned"])  # only the latents that are needed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT uses it
@pytest.mark.timeout(900)  # takes a minute on an idle core
def test_fine_tuning_with_a_concept_ablated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(TUTORIALS / "fine_tuning_with_a_concept_ablated.md", tmp_path)
    alike, apart = names["alike"], names["apart"]
    assert min(alike.values()) > 0.9
    assert apart["comments"] > 0.85 and max(apart["plain"], apart["random"]) < apart["comments"] - 0.1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in names["model"].modules())
