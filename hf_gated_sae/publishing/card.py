"""The model card of one SAE, generated from the SAE and its facts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from ..modeling import SAEConfig, SAEModel
from .facts import CardFacts
from .markdown import cell, marked, number, with_front_matter

CURVE = ("step", "activations", "l0", "fvu", "gamma", "loss_recovered", "loss_clean", "loss_spliced")
"""Columns of the card's table of metrics on held-out text."""

HEADLINE = ("l0", "fvu", "loss_recovered", "relative_reconstruction_bias", "dead_fraction")
"""Metrics that go into ``model-index``, and that the card lists as not measured if they are absent."""

MEANINGS = {
    "l0": "mean number of active latents per token",
    "fvu": "fraction of variance unexplained, 0 is perfect",
    "fvu_with_outliers": "fvu of all activations, outliers included",
    "outliers": "activations left out for their large norm, except from metrics named `..._with_outliers`",
    "outlier_variance": "share of the variance of all activations that is due to the outliers",
    "mse": "squared error per token, summed over the width",
    "loss_recovered": "share of the loss increase by zero ablation that splicing avoids; 1 is perfect",
    "relative_reconstruction_bias": "gamma; 1 is unbiased, below 1 is shrinkage",
    "relative_reconstruction_bias_with_outliers": "gamma of all activations, outliers included",
    "relative_reconstruction_bias_centred": "gamma after subtracting the decoder bias",
    "cosine": "mean cosine between activation and reconstruction",
    "norm_ratio": "mean norm of the reconstruction over that of the activation",
    "dead_fraction": "share of latents that never fired on these tokens",
    "dense_fraction": "share of latents that fired on more than a tenth of the tokens",
    "loss_clean": "cross-entropy of the model without edits, nats per token",
    "loss_spliced": "the same with the site replaced by its reconstruction",
    "loss_zero_ablated": "the same with the site set to zero",
    "tokens": "tokens measured",
}
SHOWN_LABELS = 40
TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
"""Suffixes of text files: a name with one slash and such a suffix is a file, not a data set."""


def model_card(
    sae: SAEModel, facts: CardFacts | None = None, *, repo_id: str | None = None, subfolder: str = ""
) -> str:
    """Return the card as Markdown with its YAML front matter.

    Args:
        sae: the SAE.
        facts: about the SAE, beyond its configuration; none by default.
        repo_id: repository that the card is for, used in its example code.
        subfolder: folder of the SAE in that repository.

    Raises:
        InputError: if the facts name a licence that is not on the Hub's list.
    """
    facts = (facts or CardFacts()).licensed()
    body = _template().render(
        sae=sae,
        config=sae.config,
        facts=facts,
        title=card_title(sae, facts, repo_id, subfolder),
        kind=type(sae).__name__,
        dtype=str(sae.dtype).removeprefix("torch."),
        reads=_site_list(sae.config.sites_read),
        writes=_site_list(sae.config.sites_written),
        base_model_link=_base_model_link(sae),
        measured=[(name, value, MEANINGS.get(name, "")) for name, value in facts.metrics.items()],
        missing=[name for name in HEADLINE if name not in facts.metrics],
        equations=equations(type(sae)),
        conventions=conventions(sae.config),
        curve_names=[name for name in CURVE if any(name in row for row in facts.curve)],
        datasets=[PurePath(name).name if name.startswith(("/", ".", "~")) else name for name in facts.datasets],
        licence=_licence(facts),
        labels=facts.labels[:SHOWN_LABELS],
        hidden_labels=max(len(facts.labels) - SHOWN_LABELS, 0),
        source=repo_id or "path/to/this/folder",
        subfolder=subfolder if repo_id else "",
        can_splice=bool(sae.config.site and is_repo_id(sae.config.base_model) and not sae.config.is_transcoder),
    )
    return with_front_matter(card_data(sae, facts, repo_id, subfolder).to_dict(), marked("card", body))


def card_data(sae: SAEModel, facts: CardFacts, repo_id: str | None = None, subfolder: str = "") -> ModelCardData:
    """Return the card's front matter, which the Hub indexes."""
    config = sae.config
    title = card_title(sae, facts, repo_id, subfolder)
    base: dict[str, Any] = (
        {"base_model": config.base_model, "base_model_relation": "adapter"} if is_repo_id(config.base_model) else {}
    )
    return ModelCardData(
        model_name=title,
        library_name="hf-gated-sae",
        pipeline_tag="feature-extraction",
        tags=[
            "sparse-autoencoder",
            *(["transcoder"] if config.is_transcoder else []),
            f"{config.architecture.replace('_', '-')}-sae",
            "interpretability",
            *([config.site] if config.site else []),
        ],
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        datasets=[name for name in facts.datasets if is_dataset_id(name)] or None,
        eval_results=_eval_results(facts) or None,
        **base,
    )


def card_title(sae: SAEModel, facts: CardFacts, repo_id: str | None = None, subfolder: str = "") -> str:
    """Return the SAE's title: the given name, else repository and subfolder, else architecture and site."""
    if facts.name:
        return facts.name
    if repo_id:
        return "/".join(part for part in (repo_id.split("/")[-1], subfolder) if part)
    return f"{type(sae).__name__} at {sae.config.site}" if sae.config.site else type(sae).__name__


def equations(model_class: type[SAEModel]) -> str:
    """Return the description and source in an architecture's docstring, as Markdown.

    >>> from hf_gated_sae import StandardSAE
    >>> equations(StandardSAE).splitlines()[0]
    '`latents = relu((x - b_dec) @ W_enc + b_enc)`.'
    """
    text = inspect.getdoc(model_class) or ""
    description = re.split(r"\n\n(?=(?:Attributes|Source):)", text)[0]
    source = re.search(r"^Source:.*(?:\n.+)*", text, flags=re.MULTILINE)
    joined = f"{description}\n\n{source[0]}" if source else description
    linked = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", joined)
    return linked.replace("``", "`")


def conventions(config: SAEConfig) -> list[str]:
    """Return an SAE's differences from the equations of its architecture, as Markdown.

    >>> from hf_gated_sae import StandardSAEConfig
    >>> conventions(StandardSAEConfig(d_in=4, d_sae=8, apply_b_dec_to_input=False))
    ['`b_dec` is not subtracted from the input: read `x` for `x - b_dec`.']
    """
    found = []
    if not config.apply_b_dec_to_input:
        found.append("`b_dec` is not subtracted from the input: read `x` for `x - b_dec`.")
    if config.normalization != "none":
        after = "" if config.is_transcoder else ", and the reconstruction is scaled back"
        found.append(f"Each token of `x` is normalised with `{config.normalization}` before encoding{after}.")
    if config.skip_connection:
        found.append("`x @ W_skip.T` is added to the decoder's output.")
    if config.kept_latents is not None:
        found.append(f"Only {config.rows} of the {config.d_sae} latents are held; the SAE cannot reconstruct.")
    return found


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the headline metrics that are defined, in the form of the Hub's ``model-index``.

    It requires the id of a data set on the Hub; metrics on other text are in the card's body only.
    """
    dataset = str(facts.evaluation.get("dataset"))
    if not is_dataset_id(dataset):
        return []
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name="Sparse reconstruction of activations",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=_text_or_none(facts.evaluation.get("split")),
            dataset_revision=_text_or_none(facts.evaluation.get("dataset_revision")),
            metric_type=name,
            metric_name=name,
            metric_value=facts.metrics[name],
        )
        for name in HEADLINE
        if facts.metrics.get(name) is not None
    ]


def _text_or_none(value: object) -> str | None:
    return None if value is None else str(value)


def is_repo_id(name: str | None) -> bool:
    """Whether `name` is a valid repository id, and not the path of a local folder."""
    if not name or name.startswith(("/", ".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_dataset_id(name: str) -> bool:
    """Whether a name is the id of a data set on the Hub, ``owner/name``, and not a description or a file.

    >>> is_dataset_id("acme/text"), is_dataset_id("Python standard library"), is_dataset_id("data/train.jsonl")
    (True, False, False)
    """
    return name.count("/") == 1 and is_repo_id(name) and not name.lower().endswith(TEXT_FILES)


def _licence(facts: CardFacts) -> str | None:
    """Return the licence as the card states it."""
    details = ", ".join(cell(text) for text in (facts.license_name, facts.license_link) if text)
    return f"{facts.license}: {details}" if details else facts.license


def _base_model_link(sae: SAEModel) -> str:
    """Return the base model as the card's sentences name it, with a link if it is on the Hub."""
    name = sae.config.base_model
    if name is None:
        return "a model that its configuration does not name"
    return f"[{name}](https://huggingface.co/{name})" if is_repo_id(name) else "a local model"


def _site_list(sites: list[str]) -> str:
    """Return sites as a comma-separated list in Markdown."""
    return ", ".join(f"`{cell(site)}`" for site in sites)


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and formatted values of a table."""
    return [
        (name.replace("_", " "), "; ".join(map(number, value)) if isinstance(value, list | tuple) else number(value))
        for name, value in values.items()
    ]


@cache
def _template() -> Any:
    """Return the card's template; a variable without a value is an error."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters.update(cell=cell, number=number, rows=_rows)
    return environment.from_string((files(__package__) / "card.md.jinja").read_text(encoding="utf-8"))
