"""Measuring the demo's SAEs: fidelity and concepts on files that neither they nor the model were trained on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_gated_sae.demo import corpus
from hf_gated_sae.demo.labelled_text import LabelledText, cut
from hf_gated_sae.demo.targets import concept_scores
from hf_gated_sae.demo.token_concepts import CONCEPTS
from hf_gated_sae.evaluation import evaluate
from hf_gated_sae.modeling import SAEModel
from hf_gated_sae.publishing import CardFacts, LatentLabel

from .dictionaries import DictionaryRecipe

ROWS = 16
"""Windows per forward pass."""

LATENTS_PER_CONCEPT = 3

KNOWN_FROM = 0.3
"""Smallest correlation with a concept at which a latent is labelled with it."""


def held_out_material(tokenizer: Any, context: int) -> LabelledText:
    """Return all held-out files, labelled, in windows of the model's context, each within one file."""
    texts = corpus.texts("held_out")
    return cut(tokenizer, texts, window=context, windows=1_000_000, python=True, rows=ROWS)


def dictionary_facts(
    model: Any,
    sae: SAEModel,
    material: LabelledText,
    recipe: DictionaryRecipe,
    *,
    activations: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure one stored SAE.

    Args:
        model: the demo's language model.
        sae: loaded from its folder.
        material: held-out text.
        recipe: with which the SAE was trained.
        activations: number of different activations that it was trained on.
        progress: called with the number of activations measured so far.

    Returns:
        Plain JSON: ``fidelity`` (a `FidelityReport` without its values per latent), ``density`` per latent,
        ``concepts`` (the best latents of each), ``training``, ``held_out``.
    """
    report = evaluate(model, sae, material.batches(), progress=progress)
    return {
        "fidelity": report.to_dict(per_latent=False),
        "density": [round(value, 7) for value in report.density],
        "concepts": concept_facts(model, sae, material),
        "training": {
            **recipe.arguments("unused").recipe(),
            "activations": activations,
            "activations_seen": recipe.steps * recipe.batch_size,
            "corpus": "Python standard library",
            "corpus_sha256": corpus.corpus_digest("training"),
            "python": platform.python_version(),
            "torch": str(torch.__version__).partition("+")[0],
        },
        "held_out": {
            "files": len(corpus.held_out_files()),
            "sha256": corpus.corpus_digest("held_out"),
            "tokens": material.tokens,
            "window": material.input_ids.shape[1],
        },
    }


@torch.no_grad()
def concept_facts(model: Any, sae: SAEModel, material: LabelledText) -> dict[str, Any]:
    """Measure which latents detect which concepts of Python source.

    Args:
        model: the demo's language model.
        sae: thresholds are shares of its recorded maxima, which are from training text.
        material: labelled held-out text.

    Returns:
        By concept: its description and the scores of its best latents, best first.
    """
    scores = concept_scores(model, sae, material)
    return {
        name: {
            "description": CONCEPTS[name].description,
            "best": [asdict(score) for score in scores.best(name, most=LATENTS_PER_CONCEPT)],
        }
        for name in material.names
    }


def is_good_enough(facts: dict[str, Any]) -> list[str]:
    """Check a Gated SAE's facts against the demo's quality criteria.

    Args:
        facts: from `dictionary_facts`.

    Returns:
        Descriptions of the criteria that are not met.
    """
    fidelity = facts["fidelity"]
    metrics, site = fidelity["metrics"], fidelity["site"]
    gamma = metrics["relative_reconstruction_bias"]
    needed = 0.95 if site.startswith("resid_post") else 0.85
    bars = (
        (0.98 <= gamma <= 1.02, f"gamma {gamma:.4f} is outside 0.98 .. 1.02"),
        (metrics["dead_fraction"] < 0.1, f"{metrics['dead_fraction']:.1%} of the latents are dead, 10 % or more"),
        (metrics["l0"] <= 32, f"L0 {metrics['l0']:.1f} is above 32"),
        (fidelity["loss_recovered"] >= needed, f"loss recovered {fidelity['loss_recovered']:.4f} is below {needed}"),
    )
    return [f"{site}: {complaint}" for good, complaint in bars if not good]


COMMAND = "python hub_scripts/make_demo_assets.py saes --measure-only"


def card_facts(facts: dict[str, Any], others: dict[str, dict[str, Any]]) -> CardFacts:
    """Return the model card's facts of an SAE.

    Args:
        facts: from `dictionary_facts`.
        others: the facts of SAEs at the same site to compare with, by name.

    Returns:
        The card's facts. A latent is labelled with the concept that it correlates with most, if that is at least
        `KNOWN_FROM`.
    """
    held_out, training = facts["held_out"], dict(facts["training"])
    report = facts["fidelity"]
    return CardFacts(
        metrics=_numbers_of(facts),
        comparisons={name: _numbers_of(other) for name, other in others.items()},
        evaluation={
            "dataset": "Python standard library",
            "split": f"{held_out['files']} held-out files",
            "dataset_sha256": held_out["sha256"],
            "tokens": report["metrics"]["tokens"],
            "predicted tokens": report["loss_tokens"],
            "left out": report["positions_left_out"],
            "window": held_out["window"],
            "command": COMMAND,
        },
        training={name: value for name, value in training.items() if value is not None},
        license="apache-2.0",
        labels=_labels(facts["concepts"]),
        provenance={"made by": "hub_scripts/make_demo_assets.py saes", "python": training["python"]},
        description=(
            "Trained on the activations of a small language model of Python source; an example to try things on, not "
            "a research result. Until that model is on the Hub under the id above, load it from the package, where it "
            "is `hf_gated_sae.demo.bundled.MODEL`."
        ),
    )


def _numbers_of(facts: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics and losses of a report in one mapping."""
    report = facts["fidelity"]
    losses = {name: report[name] for name in ("loss_clean", "loss_spliced", "loss_zero_ablated", "loss_recovered")}
    return {**losses, **report["metrics"]}


def _labels(concepts: dict[str, Any]) -> tuple[LatentLabel, ...]:
    """Return the concept with the highest correlation for every labelled latent, in descending order."""
    scores = [score for found in concepts.values() for score in found["best"] if score["correlation"] >= KNOWN_FROM]
    labels: dict[int, LatentLabel] = {}
    for score in sorted(scores, key=lambda score: -score["correlation"]):
        text = f"{score['concept']} (on above {score['threshold']:.3g}; base rate {score['prevalence']:.3g})"
        label = LatentLabel(score["latent"], text, precision=score["precision"], recall=score["recall"])
        labels.setdefault(score["latent"], label)
    return tuple(labels.values())


def summary(name: str, facts: dict[str, Any]) -> str:
    """Return the headline metrics of one SAE in one line."""
    report = facts["fidelity"]
    metrics = report["metrics"]
    return (
        f"{name}: L0 {metrics['l0']:.1f}, loss recovered {report['loss_recovered']:.4f}, FVU {metrics['fvu']:.4f}, "
        f"gamma {metrics['relative_reconstruction_bias']:.4f}, dead {metrics['dead_fraction']:.2%}"
    )


def facts_file(folder: Path) -> Path:
    """Return the path of the facts of the SAE in a folder."""
    return folder / "facts.json"
