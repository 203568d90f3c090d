"""The README's code runs, in order, in one process, with the loopback Hub."""

import re
from pathlib import Path

import pytest

from tests.support.documents import assert_edits, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs_and_does_what_its_comments_say(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md", tmp_path)
    config = names["sae"].config
    assert (config.site, config.d_in, config.d_sae) == ("resid_post.1", 128, 1024)
    assert names["latents"].shape == (*names["x"].shape[:2], 1024)
    assert names["reconstruction"].shape == names["x"].shape
    assert all((names["again"].state_dict()[key] == value).all() for key, value in names["sae"].state_dict().items())
    assert 0.5 < names["report"].loss_recovered <= 1.05
    assert_edits(names)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_the_named_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"`((?:hf_gated_sae|hub_scripts|model_cards)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
