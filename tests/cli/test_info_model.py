"""`hf-gated-sae info --model` at 80 columns."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from hf_gated_sae.cli import info as _command  # noqa: F401  # registers the command
from hf_gated_sae.cli.app import app
from hf_gated_sae.cli.model_sites import layers_text
from hf_gated_sae.demo.bundled import MODEL
from hf_gated_sae.errors import InputError, SiteError
from hf_gated_sae.sites import resolve
from tests.support.tiny_models import tiny_model


def run(*arguments, columns=80):
    return CliRunner().invoke(app, ["info", *arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})


def lines(done):
    assert done.exit_code == 0, done.output
    return [line.rstrip() for line in done.stdout.splitlines()]


def rows(done, site):
    """Return the table's rows of a site, with wrapped cells joined."""
    found, inside = [], False
    for line in lines(done):
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == site:
            found.append(cells[1:])
            inside = True
        elif inside and line.startswith("   ") and len(cells) == 1 and cells[0]:
            found[-1][1] += cells[0] if "." in found[-1][1].rpartition(" ")[2] else f" {cells[0]}"
        else:
            inside = False
    return found


def test_the_bundled_model():
    done = run("--model", str(MODEL))
    assert max(map(len, lines(done))) <= 80
    assert rows(done, "resid_post.L") == [["0..3", "model.layers.L.output", "128"]]
    assert rows(done, "resid_mid.L") == [["0..3", "model.layers.L.post_attention_layernorm.input", "128"]]
    assert rows(done, "mlp_neurons.L") == [["0..3", "model.layers.L.mlp.down_proj.input", "384"]]
    assert "LlamaForCausalLM" in done.stdout and "sequential in 0..3" in done.stdout
    text = " ".join(done.stdout.split())
    assert "norm_no_gain rms_norm=1e-06 at resid_pre.L (0..3), resid_mid.L (0..3), resid_post.L (0..3)" in text
    assert 'capture(model, "resid_post.3", **batch)' in done.stdout


def test_refused_sites_are_shown_with_their_reason(tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path)
    done = run("--model", str(tmp_path))
    text = " ".join(done.stdout.split())
    assert max(map(len, lines(done))) <= 80
    assert "no resid_mid in 0..2: attention and feed-forward are added together, in parallel" in text
    assert "refused: attention and feed-forward are added together, in parallel" in text
    assert rows(done, "resid_post.L") == [["0..2", "gpt_neox.layers.L.output", "32"]]


def test_kinds_of_blocks_have_a_row_each(tmp_path):
    tiny_model("llama4_text").save_pretrained(tmp_path)
    done = run("--model", str(tmp_path), columns=200)
    neurons = rows(done, "mlp_neurons.L")
    assert len(neurons) == 2, "experts have no neurons of one layer"
    assert sorted(row[0] for row in neurons) == ["0, 2", "1"]


def test_rows_are_the_sites_of_the_map():
    model = tiny_model("mamba")
    sites = resolve(model)
    names = [f"{row.name}.{layer}" for row in sites.rows() if row.proven for layer in row.layers]
    names += [row.name for row in sites.rows() if row.proven and not row.layers]
    assert sorted(names) == sorted(sites.names())
    for row in sites.rows():
        for layer in row.layers:
            site = f"{row.name}.{layer}"
            assert (site in sites) == row.proven
            if row.proven:
                assert str(sites[site].tensor_path) == row.tensor_path.replace(".L.", f".{layer}.")
                assert sites[site].width == row.width
            else:
                with pytest.raises(SiteError, match=re.escape(row.reason)):
                    sites[site]


def test_scaled_contributions_are_shown_as_such():
    model = tiny_model("granite")
    [row] = [row for row in resolve(model).rows() if row.name == "mlp_out"]
    assert row.tensor_path == "model.layers.L.mlp.output * 0.22"


def test_a_model_without_a_chain_of_blocks_says_why():
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]  # one block runs twice
    sites = resolve(model)
    assert not sites.names() and not any(row.proven for row in sites.rows())


@pytest.mark.parametrize("arguments", [(), ("some/repo", "--model", "some/model")])
def test_exactly_one_of_repository_and_model(arguments):
    done = run(*arguments)
    assert isinstance(done.exception, InputError)
    assert "hf-gated-sae info --model MODEL" in str(done.exception)


def test_a_model_that_is_no_causal_language_model(tmp_path):
    for name in (tmp_path, tmp_path / "none"):
        done = run("--model", str(name))
        assert isinstance(done.exception, InputError)
        assert "cannot be loaded by AutoModelForCausalLM" in str(done.exception)
    assert "there is no folder" in str(done.exception)


def test_a_model_whose_weights_are_broken(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"broken" + weights.read_bytes()[:1000])
    done = run("--model", str(tmp_path))
    assert isinstance(done.exception, InputError)
    assert "cannot be loaded by AutoModelForCausalLM (Safetensor" in str(done.exception)


def test_layers():
    assert layers_text([]) == ""
    assert layers_text([4]) == "4"
    assert layers_text([0, 1]) == "0, 1"
    assert layers_text(range(26)) == "0..25"
    assert layers_text([0, 2, 3, 4, 9]) == "0, 2..4, 9"
