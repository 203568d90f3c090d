"""The survey: the models that it builds, its findings for a few types, and that it notices a wrong site."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from hf_gated_sae.sites import Site, Slot, resolve
from hub_scripts import tiny_types
from hub_scripts.site_survey import Finding, check, examine, main, traced_faults
from hub_scripts.tiny_types import build, small_config


def test_sizes_are_tiny_wherever_they_are_and_each_kind_of_layer_is_there() -> None:
    config = small_config("gemma3").get_text_config()
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (32, 4, 2)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers <= tiny_types.MOST_DEPTH


def test_every_parameter_is_random() -> None:
    for name, parameter in build("doge").named_parameters():
        assert parameter.unique().numel() > 1, name


def test_a_type_whose_sites_are_all_proven() -> None:
    found = examine("llama")
    assert (found.result, found.decoder, found.n_layers) == ("full", True, 4)
    assert found.stream == {"sum": 8}
    assert found.places["attn_out"] == ["model.layers.L.self_attn.output"]


def test_relations_of_a_stream_that_is_normed_are_found() -> None:
    assert examine("openai-gpt").stream == {"norm of the sum": 8}
    assert examine("minimax").stream == {"sum with the scaled or normed stream": 8}


def test_refused_sites_are_counted_as_refused() -> None:
    found = examine("falcon_h1")
    assert found.result == "in part"
    assert "attn_out.0" in next(names for reason, names in found.refused.items() if "have that role" in reason)


def test_a_wrong_site_is_noticed() -> None:
    model = build("llama")
    sites = resolve(model)
    wrong, right = sites["mlp_in.1"], sites["mlp_out.1"]
    sites._slots[right.site] = type(right)(right.site, wrong.tensor_path, model)
    finding = Finding("llama", n_layers=sites.n_layers)
    check(model, sites, finding)
    assert finding.wrong[0] == "resid_post.1 does not come from resid_mid and mlp_out"


def test_a_site_that_contradicts_the_traced_operations_is_noticed() -> None:
    model = build("gemma4_unified_text")
    sites = resolve(model)
    count, wrong = traced_faults(model, sites)
    assert (count, wrong) == (7 * sites.n_layers, [])
    for site, place in (
        ("attn_in.1", sites["model.layers.1.self_attn.output"].tensor_path),
        ("mlp_in.1", sites["resid_mid.1"].tensor_path),
        (
            "mlp_out.1",
            dataclasses.replace(sites["mlp_out.1"].tensor_path, scale=model.model.layers[1].layer_scalar.item()),
        ),
    ):
        right = sites._slots[Site.parse(site)]
        sites._slots[right.site] = Slot(right.site, place, model)
        [fault] = traced_faults(model, sites)[1]
        assert fault.startswith(f"{site} is not")
        sites._slots[right.site] = right


def test_it_writes_what_it_found(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["llama", "falcon_h1", "gemma3n", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "3 types, 2 built and run, 2 of them decoder-only." in result.output
    rows = json.loads((tmp_path / "survey.json").read_text())
    assert [row["result"] for row in rows] == ["full", "in part", "not built"]
    assert "| `falcon_h1` |" in (tmp_path / "survey.md").read_text()
