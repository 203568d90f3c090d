"""Model cards state all facts that are known, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from hf_gated_sae.architectures import architectures
from hf_gated_sae.errors import InputError
from hf_gated_sae.publishing import CardFacts, LatentLabel, card, model_card
from hf_gated_sae.publishing.markdown import split_front_matter
from tests.support.cards import require_valid
from tests.support.example_saes import D_SAE, build, example
from tests.support.mini_hub import MiniHub
from tests.support.tiny_models import HIDDEN

FULL = CardFacts(
    metrics={"l0": 17.25, "fvu": 0.0625, "loss_recovered": 0.975, "relative_reconstruction_bias": 1.0078125, "odd": 7},
    comparisons={"standard": {"l0": 33.0, "fvu": None}},
    evaluation={"dataset": "acme/held-out", "split": "test", "tokens": 123456, "command": "make measure-it-again"},
    training={"steps": 20_000, "sparsity_coefficient": 0.5},
    datasets=("acme/text", "/home/me/data"),
    license="apache-2.0",
    labels=(LatentLabel(3, "inside a string", precision=0.875, recall=0.5), LatentLabel(9, "a | b\n<script>")),
    provenance={"converted from": "acme/original@0123456"},
    name="A fine SAE",
    description="It was *fun*.",
)


@pytest.mark.parametrize("architecture", list(architectures))
def test_every_architecture_has_a_valid_card_with_its_equations(hub: MiniHub, architecture: str) -> None:
    sae = example(architecture, site="resid_post.2", base_model="acme/lm", base_model_revision="f00" * 13 + "f")
    text = model_card(sae, FULL, repo_id="me/sae", subfolder="a/b")
    require_valid(ModelCard(text))
    data, body = split_front_matter(text)
    assert data["library_name"] == "hf-gated-sae" and data["pipeline_tag"] == "feature-extraction"
    assert data["base_model"] == "acme/lm" and data["base_model_relation"] == "adapter"
    tag = architecture.replace("_", "-") + "-sae"
    assert data["tags"] == ["sparse-autoencoder", tag, "interpretability", "resid_post.2"]
    equations = body.split("## Equations")[1].split("\n## ")[0]
    assert "latents" in equations and "``" not in equations and "Attributes:" not in equations
    assert re.search(r"https://arxiv.org/abs/\d{4}\.\d{5}", body)
    assert "https://arxiv.org/abs/2404.16014" in body and "rajamanoharan2024gated" in body
    assert "f00" * 13 + "f" in body
    assert 'SAEModel.from_pretrained("me/sae", subfolder="a/b")' in body


def test_all_facts_are_in_the_card() -> None:
    _, body = split_front_matter(model_card(example(), FULL))
    for told in (
        "# A fine SAE", "| `l0` | 17.25 | 33 |", "| `fvu` | 0.0625 | undefined |", "| 0.975 | not measured |", "1.008",
        "| `odd` | 7 |", "acme/held-out", "123,456", "make measure-it-again", "| steps | 20,000 |",
        "| sparsity coefficient | 0.5 |", "acme/text", "| 3 | inside a string | 0.875 | 0.5 |",
        "converted from: acme/original@0123456", "licence: apache-2.0", "It was *fun*.", f"{D_SAE}",
    ):  # fmt: skip
        assert told in body, told
    assert "Not measured: `dead_fraction`." in body
    assert "<script>" not in body and "| 9 | a \\| b &lt;script> | not measured | not measured |" in body


def test_the_numbers_are_in_the_model_index() -> None:
    data, _ = split_front_matter(model_card(example(), FULL))
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "A fine SAE" and result["dataset"] == {
        "name": "acme/held-out", "type": "acme/held-out", "split": "test"
    }  # fmt: skip
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "l0": 17.25, "fvu": 0.0625, "loss_recovered": 0.975, "relative_reconstruction_bias": 1.0078125
    }  # fmt: skip
    assert data["datasets"] == ["acme/text"] and data["license"] == "apache-2.0"


@pytest.mark.parametrize("dataset", ["Python standard library", "held_out.txt", "texts/held_out.txt", None])
def test_numbers_on_text_that_is_not_on_the_hub_are_only_in_the_body(dataset: str | None) -> None:
    """The Hub's metadata needs the id of a data set, to which the Hub links."""
    facts = CardFacts(metrics={"l0": 17.25}, evaluation={"dataset": dataset}, datasets=("a book", "data/train.jsonl"))
    data, body = split_front_matter(model_card(example(), facts))
    assert not {"model-index", "datasets"} & set(data)
    assert "| `l0` | 17.25 |" in body and "| data | a book, data/train.jsonl |" in body
    assert dataset is None or f"| dataset | {dataset} |" in body


def test_a_folder_of_the_authors_machine_is_named_without_its_path() -> None:
    text = model_card(example(), FULL)
    assert "/home/me" not in text and "| data | acme/text, data |" in text


def test_the_licence_is_spelt_as_the_hub_does() -> None:
    data, body = split_front_matter(model_card(example(), CardFacts(license="Apache 2.0")))
    assert data["license"] == "apache-2.0" and "- licence: apache-2.0\n" in body
    with pytest.raises(InputError, match="Did you mean 'apache-2.0'"):
        model_card(example(), CardFacts(license="apche-2.0"))
    with pytest.raises(InputError, match="without license='other'"):
        model_card(example(), CardFacts(license_name="mine"))


def test_a_licence_that_is_not_on_the_list(hub: MiniHub) -> None:
    text = model_card(example(), CardFacts(license="other", license_name="mine-1.0", license_link="LICENSE"))
    data, body = split_front_matter(text)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "mine-1.0", "LICENSE")
    assert "- licence: other: mine-1.0, LICENSE\n" in body
    require_valid(ModelCard(text))


def test_nothing_is_claimed_when_nothing_is_known() -> None:
    data, body = split_front_matter(model_card(build("gated")))
    assert not {"model-index", "license", "datasets", "base_model"} & set(data)
    for said in ("Nothing has been measured", "not stated by the author", "was not recorded", "site | not stated"):
        assert said in body, said
    measured = body.split("## Measured")[1].split("\n## ")[0]
    assert "attach(" not in body and not re.search(r"\d", measured)


@pytest.mark.parametrize("name", ["/home/me/models/lm", "./lm", "~/lm", "../lm"])
def test_paths_of_the_authors_machine_are_not_published(name: str) -> None:
    text = model_card(example(base_model=name, site="resid_post.1"))
    assert name not in text and "a local model" in text and "base_model" not in split_front_matter(text)[0]


def test_undefined_numbers_are_called_undefined() -> None:
    text = model_card(example(), CardFacts(metrics={"fvu": float("nan"), "l0": float("inf")}))
    assert text.count("| undefined |") == 2 and "model-index" not in split_front_matter(text)[0]
    assert "The evaluation of these metrics was not recorded." in text


def test_many_labels_are_cut() -> None:
    labels = tuple(LatentLabel(index, f"meaning {index}") for index in range(50))
    text = model_card(example(), CardFacts(labels=labels))
    assert "meaning 39" in text and "meaning 40" not in text and "10 more are in `sae_metrics.json`" in text


def test_an_undefined_variable_in_the_template_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    template = card._template()
    assert template.environment.from_string("{{ sae }}").render(sae=1) == "1"
    with pytest.raises(UndefinedError):
        template.environment.from_string("{{ nobody_gave_this }}").render(sae=1)


def test_the_code_of_the_card_runs(hub: MiniHub, repo_id: str) -> None:
    """Unchanged, with a tiny base model on the loopback Hub."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base_id = repo_id + "-base"
    layout = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **layout))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    revision = push_plain(hub, base_id, model, tokenizer)
    sae = build("gated", d_in=HIDDEN, site="resid_post.1", base_model=base_id, base_model_revision=revision)
    sae.push_to_hub(repo_id, subfolder="resid_post.1")
    text = read(hub, repo_id, "resid_post.1/README.md")
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "card", "exec"), namespace)  # the point of the test
    logits, batch = namespace["logits"], namespace["batch"]
    assert isinstance(logits, torch.Tensor) and torch.isfinite(logits).all()
    with torch.no_grad():
        plain = namespace["model"](**batch).logits  # type: ignore[operator]
    assert not torch.equal(plain, logits)


def word_tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "The", "quick", "brown", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def push_plain(hub: MiniHub, repo_id: str, *parts: object) -> str:
    """Put a model and its tokenizer on the loopback Hub and return the commit."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)  # type: ignore[attr-defined]
        return hub.seed(repo_id, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def read(hub: MiniHub, repo_id: str, path: str) -> str:
    text: str = hub.blob(hub.repo(repo_id).at("main").files[path].sha256).read_text()
    return text


def test_front_matter_is_plain_yaml() -> None:
    text = model_card(example(site="resid_post.2", base_model="acme/lm"), FULL)
    block = text.split("---\n")[1]
    assert yaml.safe_load(block)["license"] == "apache-2.0" and "!!" not in block
