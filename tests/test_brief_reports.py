"""Results and reports have a repr of a few lines, however large they are."""

import copy
import dataclasses
import json

import pytest
import torch

from hf_gated_sae import (
    Clamp,
    InterventionPlan,
    SAESet,
    Splice,
    Steer,
    attach,
    attribute,
    evaluate,
    harvest,
    resolve,
    save_activations,
    search,
)
from hf_gated_sae.evaluation.concepts import ConceptScore
from hf_gated_sae.functional.short_repr import COLUMNS, LINES, few_lines, short_repr
from hf_gated_sae.hooks.attach import AttachCheck
from hf_gated_sae.hooks.attach_report import AttachReport, InterventionReport
from tests.hooks.support import make_sae, model_of

LONG = "a sentence that was written by somebody else " * 200


def ids(rows=64, columns=40):
    return torch.randint(3, 90, (rows, columns), generator=torch.Generator().manual_seed(0))


def entry(number):
    positions = {row: list(range(1000)) for row in range(500)}
    return InterventionReport("Clamp", f"resid_post.{number}", 1000, 500_000, positions)


def attached():
    model, sae = model_of("llama"), make_sae()
    handle = attach(model, *(Steer(sae, number, strength=0.1) for number in range(40)), check=False)
    with handle, torch.no_grad():
        model(ids())
    return handle


def many_saes(folder):
    path = folder / ("deep/" * 20)
    make_sae().save_pretrained(path / "one")
    return SAESet.from_pretrained(path)


def shards(folder):
    made = save_activations(folder / "shards", model_of("llama"), ["resid_post.1"], [ids(2)])
    index = json.loads((made.folder / "index.json").read_text())
    made.index = {**index, "values": {f"resid_post.{number}": {} for number in range(500)}}
    return made


def site_map(layers=1000):
    found = copy.copy(resolve(model_of("llama")))  # the map itself is cached for all tests that share this model
    found.n_layers = layers
    return found


LARGE = {
    "attachment": lambda folder: attached(),
    "attach report": lambda folder: attached().report(),
    "large attach report": lambda folder: AttachReport([entry(number) for number in range(100)]),
    "empty attach report": lambda folder: AttachReport([]),
    "intervention report": lambda folder: entry(0),
    "check": lambda folder: AttachCheck("GatedSAE", "resid_post.1", 10, 0.1, 5.0, 3.0, None, None, None, LONG),
    "fidelity": lambda folder: dataclasses.replace(
        evaluate(model_of("llama"), make_sae(), [ids(4)]), density=(1 / 3,) * 100_000, warnings=(LONG,) * 50
    ),
    "metrics": lambda folder: evaluate(model_of("llama"), make_sae(), [ids(4)]).metrics,
    "harvest": lambda folder: next(iter(harvest(model_of("llama"), ["resid_post.1", make_sae()], [ids()]))),
    "attribution": lambda folder: attribute(
        model_of("llama"), make_sae(), lambda output: output.logits.sum(), input_ids=ids(4)
    ),
    "largest effects": lambda folder: attribute(
        model_of("llama"), make_sae(), lambda output: output.logits.sum(), input_ids=ids(4)
    ).top(1)[0],
    "active latents": lambda folder: make_sae().encode_sparse(torch.randn(1000, 32)),
    "training loss": lambda folder: make_sae().training_loss(torch.randn(1000, 32)),
    "set": many_saes,
    "shards": shards,
    "site map": lambda folder: site_map(),
    "search result": lambda folder: dataclasses.replace(search("gpt2-small", live=False)[0], subfolder=LONG),
    "concept score": lambda folder: ConceptScore(LONG, 3, *([1 / 3] * 8), 10, 10, 1000),
    "plan": lambda folder: InterventionPlan([Clamp(make_sae(), {3: 8.0}), *([Splice(make_sae())] * 2000)]),
}


@pytest.mark.parametrize("name", LARGE)
def test_reprs_are_a_few_lines(name, tmp_path):
    report = LARGE[name](tmp_path)
    for text in (repr(report), str(report)) if name != "check" else (repr(report),):
        assert 10 < len(text) <= LINES * (COLUMNS + 1)
        assert len(text.splitlines()) <= LINES and max(map(len, text.splitlines())) <= COLUMNS
        assert "tensor(" not in text


def test_reprs_have_the_essential_numbers():
    text = repr(attached().report())
    assert "Steer at resid_post.1: 2560 tokens edited in 1 calls, rows [0, 1, 2, 3, 4, 5, 6, 7, ... 64 in all]" in text
    assert text.endswith("... and 31 more")
    handle = attached()
    assert repr(handle) == "Attachment, not acting: Steer at resid_post.1 (40 times)"
    with attach(model_of("llama"), Splice(make_sae()), check=False) as handle:
        assert repr(handle) == "Attachment, acting: Splice at resid_post.1"
    report = evaluate(model_of("llama"), make_sae(), [ids(4)])
    assert f"loss_recovered={report.loss_recovered:.6g}" in repr(report).replace("\n    ", " ")
    for name in ("fvu", "l0", "dead_fraction", "dense_fraction"):
        assert f"{name}={getattr(report.metrics, name):.6g}" in repr(report).replace("\n    ", " ")
    assert len(report.density) == 64


def test_omitted_lines_are_counted():
    assert few_lines(["one", "two"]) == "one\ntwo"
    assert few_lines([]) == ""
    assert few_lines(str(number) for number in range(10)).splitlines()[-1] == "9"
    assert few_lines(str(number) for number in range(11)).splitlines()[8:] == ["8", "... and 2 more"]


def test_values_are_shown_by_their_kind_and_size():
    @dataclasses.dataclass
    class Report:
        x: object

        __repr__ = short_repr

    sae = make_sae()
    shown = {
        "float32 [2, 3]": torch.zeros(2, 3),
        "GatedSAE": sae,
        "{GatedSAE: bfloat16 [2]}": {sae: torch.zeros(2, dtype=torch.bfloat16)},
        "[1, 2]": [1, 2],
        "(0, 1, 2, 3, ... 9 in all)": tuple(range(9)),
        "None": None,
        "'text'": "text",
        "nan": float("nan"),
        "Report(x=1)": Report(1),
    }
    for text, value in shown.items():
        assert repr(Report(value)) == f"Report(x={text})"
    nested = []
    nested.append(nested)
    assert len(repr(Report(nested))) < 100
