"""`hf-gated-sae search` at 80 columns."""

from __future__ import annotations

import ast
import re

import pytest
from typer.testing import CliRunner

from hf_gated_sae.catalog.search_result import SearchResult
from hf_gated_sae.cli import search as _command
from hf_gated_sae.cli.app import app
from hf_gated_sae.errors import UnknownNameError


def run(*arguments):
    return CliRunner().invoke(app, ["search", *arguments, "--no-live"], env={"COLUMNS": "80", "NO_COLOR": "1"})


def calls(output):
    """Return the arguments of the printed calls, with wrapped lines joined."""
    code = output.split("from hf_gated_sae import SAEModel\n")[1].split("\n\n")[0]
    parts = re.split(r"^ *\d+  ", code, flags=re.MULTILINE)[1:]
    return [[argument.value for argument in ast.parse(part.strip()).body[0].value.args] for part in parts]


def test_a_table_and_the_code_that_loads_each_row():
    done = run(
        "--model", "google/gemma-2-2b", "--layer", "12", "--site", "resid_post", "--width", "16k", "--limit", "5"
    )
    assert done.exit_code == 0
    assert calls(done.output) == [
        ["google/gemma-scope-2b-pt-res", f"layer_12/width_16k/average_l0_{l0}"] for l0 in (22, 41, 82, 176, 445)
    ]
    assert max(map(len, done.output.splitlines())) <= 80
    rows = [line.split() for line in done.output.splitlines() if "resid_post.12" in line]
    assert rows[0] == ["1", "resid_post.12", "16,384", "jumprelu", "22", "google"]


def test_a_target_is_not_shown_as_a_measurement():
    done = run("--model", "google/gemma-3-4b-pt", "--layer", "17", "--l0", "60", "--limit", "1")
    [row] = [line.split() for line in done.output.splitlines() if "resid_post.17" in line]
    assert row[-2:] == ["~60", "google"] and "~: target of training" in done.output
    assert "~" not in run("--model", "google/gemma-2-2b", "--layer", "12", "--limit", "5").output


def test_results_beyond_the_limit_are_counted():
    done = run("--model", "google/gemma-2-2b", "--layer", "12", "--limit", "3")
    assert len(calls(done.output)) == 3
    assert "284 more:" in done.output and "--limit 0 for all" in done.output
    every = run("--model", "google/gemma-2-2b", "--layer", "12", "--limit", "0", "--l0", "80")
    assert len(calls(every.output)) == 14 and "more:" not in every.output


def test_without_a_model_each_row_shows_its_model():
    done = run("--architecture", "gated", "--limit", "2")
    assert "pythia-70m" in done.output and "gated" in done.output
    assert max(len(line) for line in done.output.splitlines() if "SAEModel" not in line and '"' not in line) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "gpt2", "--layer", "44"], "has SAEs at layers 0, 1, 2"),
        (["--model", "gpt2", "--site", "mlp_in"], "Known sites: attn_out, attn_z, mlp_out"),
        (["--site", "attn_pattern.7", "--layer", "8"], ""),
    ],
)
def test_without_results_it_says_which_saes_exist(arguments, said):
    done = run(*arguments)
    assert done.exit_code == 1
    if said:
        assert said in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("blocks.5.hook_resid_pre", "resid_pre.5"),
        ("blocks.5.hook_mlp_out", "mlp_out.5"),
        ("h.5", "resid_post.5"),
        ("model.layers.5", "resid_post.5"),
        ("layers_output[5]", "resid_post.5"),
        ("hook_resid_pre", "resid_pre"),
        ("resid_pre", "resid_pre"),
        ("attn_z.5", "attn_z.5"),
    ],
)
def test_sites_by_the_names_of_other_libraries(given, meant):
    other, ours = (run("--model", "gpt2", "--site", site, "--limit", "3") for site in (given, meant))
    assert other.output == ours.output and ours.exit_code == 0


def test_misspelt_site_names_get_close_matches():
    assert "Did you mean 'blocks.L.hook_resid_pre'" in str(run("--site", "blocks.5.hook_resid_prr").exception)
    assert "Did you mean 'resid_pre'" in str(run("--site", "resid_prr.5").exception)


def test_an_unknown_model_is_our_error():
    assert isinstance(run("--model", "google/gemma-2-2").exception, UnknownNameError)


def test_a_model_whose_saes_have_unknown_sites(monkeypatch):
    monkeypatch.setattr("hf_gated_sae.catalog.index_search.search", lambda *_, **__: [SearchResult("me/saes")])
    assert _command._alternatives("me/lm", 3, False) == " Known sites: ?; widths: ?."
    monkeypatch.setattr("hf_gated_sae.catalog.index_search.search", lambda *_, **__: [])
    assert _command._alternatives("me/lm", None, False) == " None is known for me/lm."
