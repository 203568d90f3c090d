"""What the demo's SAEs are worth: fidelity and measured concepts on files that neither they nor the model ever saw."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..evaluation import ConceptScores, evaluate
from ..hooks import capture
from ..modeling import SAEModel
from . import corpus
from .concepts import CONCEPTS
from .dictionaries import DictionaryRecipe
from .material import Material, cut

ROWS = 16
"""Windows per forward pass."""

LATENTS_PER_CONCEPT = 3


def held_out_material(tokenizer: Any, context: int) -> Material:
    """Return all held-out files, labelled, in windows as long as the model's context, none across two files."""
    texts = corpus.texts("held_out")
    return cut(tokenizer, texts, window=context, windows=1_000_000, python=True)


def dictionary_facts(
    model: Any,
    sae: SAEModel,
    material: Material,
    recipe: DictionaryRecipe,
    *,
    activations: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure one stored SAE.

    Args:
        model: the demo's language model.
        sae: as loaded from where it was stored.
        material: held-out text.
        recipe: how the SAE was trained.
        activations: number of different activations that it was trained on.
        progress: called with the number of activations measured so far.

    Returns:
        Plain JSON: ``fidelity`` (a `FidelityReport` without its values per latent), ``density`` per latent,
        ``concepts`` (the best latents of each), ``training``, ``held_out``.
    """
    report = evaluate(model, sae, material.batches(ROWS), progress=progress)
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
def concept_facts(model: Any, sae: SAEModel, material: Material) -> dict[str, Any]:
    """Measure which latents tell which concepts of Python source.

    Args:
        model: the demo's language model.
        sae: its recorded maxima, from training text, are what thresholds are shares of.
        material: labelled held-out text.

    Returns:
        By concept: its description and the scores of its best latents, best first.
    """
    if material.labels is None:
        raise ValueError("The text has no labels.")
    scores = ConceptScores(material.names, sae.max_activation)
    for batch, labels in zip(material.batches(ROWS), material.labels.split(ROWS), strict=True):
        latents = capture(model, sae, **{name: value.to(model.device) for name, value in batch.items()})[sae]
        scores.update(latents.flatten(0, 1), labels.flatten(0, 1))
    return {
        name: {
            "description": CONCEPTS[name].description,
            "best": [asdict(score) for score in scores.best(name, most=LATENTS_PER_CONCEPT)],
        }
        for name in material.names
    }


def is_good_enough(facts: dict[str, Any]) -> list[str]:
    """Check a Gated SAE's facts against the demo's quality bar.

    Args:
        facts: from `dictionary_facts`.

    Returns:
        What falls short, in words; empty if nothing does.
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


def facts_file(folder: Path) -> Path:
    """Return where the facts of the SAE in a folder are kept."""
    return folder / "facts.json"
