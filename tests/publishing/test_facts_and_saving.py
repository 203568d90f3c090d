"""Facts beside the weights, and saving everything together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, PublishError
from hf_gated_sae.evaluation import FidelityReport
from hf_gated_sae.functional import FidelityMetrics
from hf_gated_sae.publishing import CardFacts, LatentLabel, read_facts, save
from tests.support.example_saes import assert_same, example

text = st.text(max_size=8)
numbers = st.dictionaries(text, st.none() | st.integers() | st.floats(), max_size=3)
plain = st.dictionaries(text, text | st.integers() | st.booleans(), max_size=3)
labels = st.builds(LatentLabel, st.integers(0, 99), text, st.none() | st.floats(0, 1), st.none() | st.floats(0, 1))
known = st.builds(
    CardFacts,
    metrics=numbers,
    comparisons=st.dictionaries(text, numbers, max_size=2),
    evaluation=plain,
    training=plain,
    datasets=st.lists(text, max_size=2),
    license=st.none() | text.filter(bool),
    labels=st.lists(labels, max_size=2),
    provenance=plain,
    name=st.none() | text.filter(bool),
    description=st.none() | text.filter(bool),
)


@given(facts=known)
def test_facts_survive_json(facts: CardFacts) -> None:
    """Also values that are not finite, which JSON cannot hold."""
    content = json.loads(json.dumps(facts.to_dict(), allow_nan=False))
    assert CardFacts.from_dict(content) == facts


@pytest.mark.parametrize("value", ["0.1", True, {"a": 1}, [1.0]])
def test_a_metric_is_a_number(value: Any) -> None:
    with pytest.raises(InputError, match="'l0' of metrics.*expected a number"):
        CardFacts(metrics={"l0": value})
    with pytest.raises(InputError, match="'l0' of other.*expected a number"):
        CardFacts(comparisons={"other": {"l0": value}})


@pytest.mark.parametrize(
    "content, phrase",
    [
        ({"metric": {}}, "no key 'metric'. Did you mean 'metrics'"),
        ({"metrics": 3}, "cannot be used"),
        ({"labels": [{"latnt": 3}]}, "cannot be used"),
        ({"labels": [3]}, "cannot be used"),
    ],
)
def test_invalid_facts_are_refused(content: dict[str, Any], phrase: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=phrase):
        CardFacts.from_dict(content)
    (tmp_path / "sae_metrics.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=phrase):
        read_facts(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null"])
def test_a_broken_facts_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "sae_metrics.json").write_text(content)
    with pytest.raises(CheckpointError, match="sae_metrics.json"):
        read_facts(tmp_path)


def test_nothing_is_known_of_an_sae_that_was_just_built(tmp_path: Path) -> None:
    assert read_facts(example()) == CardFacts() == read_facts(tmp_path)


def report() -> FidelityReport:
    metrics = dict.fromkeys(FidelityMetrics.__dataclass_fields__, 0.5) | {"tokens": 99, "fvu": float("nan")}
    lists = dict.fromkeys(("density", "max_activation", "mean_activation"), (0.0, 1.0))
    texts = dict.fromkeys(("architecture", "site", "base_model", "base_model_revision"), "x")
    losses = {"loss_clean": 1.0, "loss_spliced": 1.5, "loss_zero_ablated": 6.0, "loss_recovered": 0.9}
    return FidelityReport(
        **texts, **losses, **lists, metrics=FidelityMetrics(**metrics), d_in=1, d_sae=2, tokens_left_out=1,
        loss_tokens=98, positions_left_out="the first", warnings=("few tokens",),
    )  # fmt: skip


def test_facts_of_a_report() -> None:
    facts = CardFacts.of_report(report(), evaluation={"dataset": "acme/text"}, license="mit")
    assert facts.metrics["loss_recovered"] == 0.9 and facts.metrics["fvu"] is None
    assert facts.metrics["loss_zero_ablated"] == 6.0 and "loss_tokens" not in facts.metrics
    assert facts.evaluation == {
        "dataset": "acme/text", "tokens": 99, "left out": "the first", "warnings": ["few tokens"]
    }  # fmt: skip
    assert facts.license == "mit"


def test_saved_with_card_and_facts(tmp_path: Path) -> None:
    sae, facts = example(site="resid_post.1"), CardFacts(metrics={"l0": 3.5}, training={"steps": 7})
    assert save(sae, tmp_path / "out", facts) == tmp_path / "out"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "sae_metrics.json"]
    loaded = SAEModel.from_pretrained(tmp_path / "out")
    assert_same(sae, loaded)
    assert_same(sae, AutoModel.from_pretrained(tmp_path / "out"))
    assert read_facts(loaded) == read_facts(tmp_path / "out") == facts
    save(loaded, tmp_path / "again", max_shard_size=200)
    assert read_facts(tmp_path / "again") == facts
    assert "| `l0` | 3.5 |" in (tmp_path / "again" / "README.md").read_text()


def test_saving_keeps_what_people_wrote(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / "notes.txt").write_text("also mine")
    save(example(), tmp_path)
    save(example(), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("# Mine") == 1 and card.count("## Equations") == 1
    assert (tmp_path / "notes.txt").read_text() == "also mine"


def test_numbers_of_an_earlier_card_leave_the_metadata(tmp_path: Path) -> None:
    measured = CardFacts(metrics={"l0": 3.5}, evaluation={"dataset": "acme/text"})
    save(example(), tmp_path, measured)
    assert "model-index" in (tmp_path / "README.md").read_text()
    save(example("standard"), tmp_path, CardFacts())
    assert "model-index" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\nmodel-index: []\n---\n# Mine\n")
    save(example(), tmp_path, CardFacts())
    assert "model-index: []" in (tmp_path / "README.md").read_text()


def test_a_byte_order_mark_does_not_hide_the_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlanguage: de\r\n---\r\n# Mine\r\n")
    save(example(), tmp_path)
    card = (tmp_path / "README.md").read_bytes()
    assert card.startswith(b"---\nlanguage: de\n") and b"# Mine\n" in card and b"\r" not in card


@pytest.mark.parametrize(
    ("facts", "readme", "error", "phrase"),
    [
        (CardFacts(license="apche-2.0"), b"# Mine", InputError, "Did you mean 'apache-2.0'"),
        (CardFacts(license="other"), b"# Mine", InputError, "license_name="),
        (CardFacts(), "# Für dich".encode("latin-1"), PublishError, "README.md is not in UTF-8"),
        (CardFacts(), "# Für dich".encode("utf-16"), PublishError, "README.md is not in UTF-8"),
    ],
)
def test_invalid_licences_and_unreadable_readmes_are_refused(
    tmp_path: Path, facts: CardFacts, readme: bytes, error: type[Exception], phrase: str
) -> None:
    (tmp_path / "README.md").write_bytes(readme)
    with pytest.raises(error, match=phrase):
        save(example(), tmp_path, facts)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"README.md": readme}


def test_a_save_that_fails_changes_nothing(tmp_path: Path) -> None:
    save(example("gated"), tmp_path, CardFacts(metrics={"l0": 1.0}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="cannot be written as JSON"):
        save(example("standard"), tmp_path, CardFacts(training={"optimiser": object()}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_facts_of_other_weights_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Metrics in a folder hold only for the weights that they were measured on."""
    published = example()
    save(published, tmp_path, CardFacts(metrics={"l0": 3.5}))
    published.save_pretrained(tmp_path)
    assert read_facts(tmp_path).metrics == {"l0": 3.5}, "the same weights"
    example("standard").save_pretrained(tmp_path)
    assert read_facts(tmp_path) == CardFacts() == read_facts(SAEModel.from_pretrained(tmp_path))
    assert "is removed" in caplog.text


def test_a_save_that_fails_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        save(example(), tmp_path / "new", CardFacts(training={"optimiser": object()}))
    assert not (tmp_path / "new").exists()
