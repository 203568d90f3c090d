"""`hf-gated-sae info` at 80 columns, and how little it downloads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_gated_sae.cli import info as command
from hf_gated_sae.cli.app import app
from hf_gated_sae.errors import MissingFileError
from hf_gated_sae.formats import formats
from hf_gated_sae.publishing import CardFacts, push_to_hub
from tests.support.example_saes import example
from tests.support.mini_hub import MiniHub

pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(app, ["info", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def facts(output):
    """Names and values of the first block."""
    return {
        name.strip(): value.strip()
        for name, _, value in (line.partition("  ") for line in output.split("\n\n")[0].splitlines())
        if name and not name.startswith(" ")
    }


def test_one_sae(hub: MiniHub, repo_id: str):
    sae = example("gated", site="resid_post.2", base_model="acme/lm")
    commit = push_to_hub(sae, repo_id, facts=CardFacts(license="apache-2.0"))
    hub.requests.clear()
    done = run(repo_id)
    assert done.exit_code == 0, done.output
    said = facts(done.output)
    assert said["repository"] == repo_id and said["commit"] == commit.oid
    assert said["licence"] == "apache-2.0" and said["layout"] == "native"
    assert said["architecture"] == "gated (GatedSAE)"
    assert (said["base model"], said["site"], said["normalisation"]) == ("acme/lm", "resid_post.2", "none")
    assert said["latents"] == f"{sae.config.d_sae:,}" and said["stored as"] == "float32"
    assert f"W_dec [{sae.config.d_sae}, {sae.config.d_out}]" in done.output
    assert said["download"].endswith("kB")
    assert f'SAEModel.from_pretrained("{repo_id}"' in done.output
    assert f'revision="{commit.oid}"' in done.output
    assert max(map(len, done.output.splitlines())) <= 120
    weights = [request for request in hub.requests if request[0] == "GET" and "model.safetensors" in request[1]]
    assert all(request[3] for request in weights), "only ranges of the weights are requested"


def test_unknown_facts_are_shown_as_such(hub: MiniHub, tmp_path):
    written = formats["gemma_scope"].examples(tmp_path)[0]
    done = run(str(tmp_path / written.repo), written.address)
    said = facts(done.output)
    assert said["licence"] == "the source states none" and said["trained on BOS"] == "no"
    assert said["base model"] == "google/gemma-2-2b" and said["layout"] == "gemma_scope"
    assert "commit" not in said


@pytest.mark.parametrize(
    ("layout", "number", "said"),
    [
        ("gemma_scope", 2, "12 (measured)"),
        ("gemma_scope_2", 2, "~66 (target of training)"),
        ("qwen_scope", 0, None),
    ],
)
def test_the_l0_that_the_index_has(hub: MiniHub, tmp_path, layout, number, said):
    written = formats[layout].examples(tmp_path)[number]
    assert facts(run(str(tmp_path / written.repo), written.address).output).get("L0") == said


def test_a_repository_of_several_saes(hub: MiniHub, tmp_path):
    written = [made for made in formats["gemma_scope"].examples(tmp_path) if made.repo.endswith("2b-pt-res")]
    done = run(str(tmp_path / written[0].repo))
    assert done.exit_code == 0, done.output
    assert facts(done.output)["SAEs"] == "2"
    lines = [line.split() for line in done.output.splitlines()]
    assert any("layer_*/width_16k/average_l0_*" in " ".join(line) for line in lines)
    assert any("embed" in line and "4,096" in line for line in lines)
    assert "from_pretrained" in done.output and max(map(len, done.output.splitlines()[:14])) <= 80


def test_a_repository_of_ours(hub: MiniHub, repo_id: str):
    for layer in (1, 2):
        push_to_hub(example(site=f"resid_post.{layer}"), repo_id, subfolder=f"resid_post.{layer}")
    done = run(repo_id)
    assert ["resid_post.*", "resid_post.*", str(example().config.d_sae), "2"] in map(
        str.split, done.output.splitlines()
    )


def test_a_folder_with_one_sae_below(tmp_path):
    written = formats["gemma_scope"].examples(tmp_path)[1]
    assert facts(run(str(tmp_path / written.repo), "layer_0").output)["address"] == written.address


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("no front matter", "the source states none"),
        ("---\n[broken\n---\n", "cannot be read"),
        ("---\n- a list\n---\n", "cannot be read"),
    ],
)
def test_licences(tmp_path, card, expected):
    example().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert expected in " ".join(run(str(tmp_path)).output.split())


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (("gpt2-small-res-jb", "blocks.5.hook_resid_pre"), ["blocks.5.hook_resid_pre"]),
        (("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.5.hook_resid_pre"), ["blocks.5.hook_resid_pre"]),
        (
            ("gemma-scope-2b-pt-res-canonical",),
            ["layer_0/width_16k/average_l0_105", "layer_0/width_65k/average_l0_73"],
        ),
    ],
)
def test_offline_the_row_of_the_index_is_shown(words, rows, tmp_path):
    """Needs its own process: the Hub's client reads the environment when it is imported."""
    code = "from hf_gated_sae.cli import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "info", *words], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "is not in the Hub cache" in done.stderr and "The index has:" in done.stderr
    assert all(f'"{row}"' in done.stdout for row in rows)
    assert "from hf_gated_sae import SAEModel" in done.stdout and "SAEModel.from_pretrained(" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_offline_the_requested_revision_is_in_the_code(hub: MiniHub):
    done = run("gpt2-small-res-jb", "blocks.5.hook_resid_pre", "--revision", "v1")
    assert done.exit_code == 0 and 'revision="v1"' in done.output


def test_an_unknown_repository_is_our_error(hub: MiniHub):
    assert isinstance(run("alice/there-is-no-such-thing").exception, MissingFileError)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (302_000_000, "302 MB"), (5.1e15, "5.1e+03 TB")]
)
def test_sizes(size, text):
    assert command.size_text(size) == text


def test_an_sae_of_several_sites(hub: MiniHub, repo_id: str):
    push_to_hub(example("cross_layer"), repo_id, facts=CardFacts(license="mit"))
    assert facts(run(repo_id).output)["site"] == "resid_post.1, resid_post.2"
