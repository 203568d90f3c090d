"""The code of the documents runs, in order, in one process; the Hub in it is the loopback one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpt2_small import seed_gpt2_small

DOCS = Path(__file__).parents[1] / "docs"


def blocks(name: str, language: str = "python") -> list[str]:
    """Return the code of a document; what is marked with another word after the language is not its own."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run the code of a document and return its names."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(name)):
        path = folder / f"block_{number}.py"
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), names)
    return names


def test_coming_from_saelens_or_neuronpedia(hub, tmp_path, monkeypatch, capsys):
    seed_gpt2_small(hub, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = run("coming-from.md", tmp_path)
    sae, latents = names["sae"], names["latents"]
    assert (sae.config.site, sae.config.base_model) == ("resid_pre.8", "openai-community/gpt2")
    assert torch.equal(latents, sae.encode(names["x"])) and latents.any()
    plain = names["model"](**names["batch"]).logits
    assert not torch.allclose(names["logits"], plain) and not torch.allclose(names["ablated"], plain)
    assert "of the loss recovered at L0" in capsys.readouterr().out
    assert len(names["written"][0]) == names["prompt"]["input_ids"].shape[1] + 8


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
