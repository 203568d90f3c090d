"""A run records the commits of its model and data set on the Hub, and keeps to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_gated_sae.demo import bundled, corpus
from hf_gated_sae.errors import (
    InputError,
)
from hf_gated_sae.training.run import Run, assemble
from hf_gated_sae.training.run.run_parts import build
from tests.support.mini_hub import MiniHub


@pytest.fixture
def on_the_hub(hub: MiniHub, repo_id: str, small: dict) -> dict[str, Any]:
    """The small run with model and data set on the Hub."""
    documents = "\n".join(json.dumps({"text": text}) for text in corpus.texts("training", 20_000))
    hub.seed(repo_id, {"data/train.jsonl": documents}, type="datasets")
    hub.seed(f"{repo_id}-lm", {path.name: path.read_bytes() for path in bundled.MODEL.iterdir()})
    small["model"] = {"name": f"{repo_id}-lm"}
    small["data"] = {"dataset": repo_id, "context_length": 32, "sequences_per_batch": 4, "buffer_size": 128}
    return small


def test_commits_are_recorded_and_read_again(hub: MiniHub, repo_id: str, on_the_hub: dict, tmp_path: Path) -> None:
    first = Run.prepare(assemble(on_the_hub))
    first.train()
    written = yaml.safe_load((Path(on_the_hub["output_dir"]) / "run.yaml").read_text())
    model, data = (hub.repo(name, type=kind).at("main").id for name, kind in _places(repo_id))
    assert (written["model"]["revision"], written["data"]["revision"]) == (model, data)
    config = first.saes[""].config
    assert (config.base_model, config.base_model_revision) == (f"{repo_id}-lm", model)
    hub.seed(repo_id, {"data/train.jsonl": json.dumps({"text": "changed since"})}, type="datasets")
    second = Run.prepare(assemble({**written, "output_dir": str(tmp_path / "again")}))
    second.train()
    assert torch.equal(first.saes[""].W_dec, second.saes[""].W_dec)


def test_a_resumed_run_stays_at_its_commits(hub: MiniHub, repo_id: str, on_the_hub: dict) -> None:
    Run.prepare(assemble(on_the_hub)).train()
    before = hub.repo(repo_id, type="datasets").at("main").id
    hub.seed(repo_id, {"data/train.jsonl": json.dumps({"text": "changed since"})}, type="datasets")
    assert Run.prepare(assemble(on_the_hub), resume=True).config.data.revision == before


def test_held_out_text_of_the_runs_data_set_has_its_configuration_and_commit(
    hub: MiniHub, repo_id: str, on_the_hub: dict
) -> None:
    configs, rows = [], {}
    for name in ("long", "short"):
        files = {split: f"{name}/{split}.jsonl" for split in ("train", "test")}
        rows |= {path: json.dumps({"text": f"import {name}_{split}\n" * 400}) for split, path in files.items()}
        listed = [{"split": split, "path": path} for split, path in files.items()]
        configs.append({"config_name": name, "data_files": listed})
    hub.seed(repo_id, {"README.md": f"---\n{yaml.safe_dump({'configs': configs})}---\n", **rows}, type="datasets")
    on_the_hub["data"]["config"] = "short"
    run = Run.prepare(assemble(on_the_hub))
    hub.seed(repo_id, {"short/test.jsonl": json.dumps({"text": "changed since"})}, type="datasets")
    [document] = run.held_out(repo_id).text.documents()
    assert "import short_test" in document


@pytest.mark.parametrize("section, name", [("model", "name"), ("data", "dataset")])
def test_what_is_not_on_the_hub_is_named(on_the_hub: dict, section: str, name: str) -> None:
    on_the_hub[section][name] = "alice/nowhere"
    with pytest.raises(InputError, match=f"{section}.{name} 'alice/nowhere' cannot be opened on the Hub"):
        build(assemble(on_the_hub))
    on_the_hub[section][name] = "no such name!"
    with pytest.raises(InputError, match=f"{section}.{name} 'no such name!'"):
        build(assemble(on_the_hub))


def _places(repo_id: str) -> list[tuple[str, str]]:
    return [(f"{repo_id}-lm", "models"), (repo_id, "datasets")]
