"""The demo, step by step; every number of it is in one `DemoReport`, which the terminal and the plot only show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import AttachError, InputError, MissingFileError
from ..evaluation import FidelityReport, evaluate
from ..modeling import SAEModel
from ..modeling.quiet import quiet_transformers
from ..publishing import CardFacts, read_facts, save
from . import bundled, corpus
from .effects import (
    AblationEffect,
    SteeringEffect,
    SteeringPlan,
    choose_by_effect,
    measure_ablation,
    measure_steering,
)
from .material import Material, cut
from .targets import ConceptTarget, Target, candidates, concept_scores, firing_target, with_evidence

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, the number of it, and the number of steps."""


@dataclass(frozen=True)
class DemoPlan:
    """What to show.

    Attributes:
        model: repository id or folder of a causal LM; the bundled one by default.
        sae: repository id or folder of an SAE; the bundled ones by default.
        subfolder: folder of the SAE inside `sae`.
        text: file with text; by default held-out source of the Python standard library.
        concept: the concept to show; chosen by measurement by default.
        latent: show this latent, whatever it means.
        out: folder to publish the SAE into.
        windows: number of text windows to measure on.
        window: tokens per window.
        steering: how to steer.
    """

    model: str | None = None
    sae: str | None = None
    subfolder: str | None = None
    text: Path | None = None
    concept: str | None = None
    latent: int | None = None
    out: Path | None = None
    windows: int = 96
    window: int = 256
    steering: SteeringPlan = field(default_factory=SteeringPlan)


@dataclass(frozen=True)
class DemoReport:
    """Everything the demo measured.

    Attributes:
        model, sae: names.
        fidelity: losses and metrics of the splice.
        target: the latent and what it stands for.
        ablation: loss change inside and outside that.
        steering: continuations before and after.
        published: the folder that was written, None if not asked for.
        files: names of the files in it.
        identical: whether the SAE read back from it equals the published one bit by bit.
    """

    model: str
    sae: str
    fidelity: FidelityReport
    target: Target
    ablation: AblationEffect
    steering: SteeringEffect
    published: Path | None
    files: tuple[str, ...]
    identical: bool


def run_demo(plan: DemoPlan, progress: Progress) -> DemoReport:
    """Run the demo.

    Args:
        plan: what to show.
        progress: told of every step.

    Returns:
        What was measured.

    Raises:
        SAEError: for anything in the plan that does not exist or does not fit together.
    """
    steps = ("load model and SAE", "read text", "splice", "find the latent", "ablate", "steer", "publish")

    def tell(step: str) -> None:
        progress(step, steps.index(step) + 1, len(steps))

    tell("load model and SAE")
    sae = load_sae(plan)
    model, tokenizer = load_model(plan)
    sae = sae.to(model.device)
    tell("read text")
    material = read_material(plan, model, tokenizer)
    tell("splice")
    # Steering measures in units of the latents' maxima; an SAE that brings none gets them from this text.
    fidelity = evaluate(model, sae, list(material.batches(8)), record=not sae.config.recorded_tokens)
    tell("find the latent")
    choosing, showing = material.halves()
    target, strength = choose_target(model, tokenizer, sae, plan, choosing, showing)
    tell("ablate")
    ablation = measure_ablation(model, sae, target, showing)
    tell("steer")
    steering = measure_steering(model, tokenizer, sae, target, showing, replace(plan.steering, strength=strength))
    require_effect(plan, steering)
    tell("publish")
    files: tuple[str, ...] = ()
    identical = False
    if plan.out is not None:
        files, identical = publish_and_reload(sae, plan.out)
    return DemoReport(
        model=plan.model or "bundled Llama, trained on the Python standard library",
        sae=f"{plan.sae or 'bundled'}/{subfolder_of(plan)}".rstrip("/"),
        fidelity=fidelity,
        target=target,
        ablation=ablation,
        steering=steering,
        published=plan.out,
        files=files,
        identical=identical,
    )


def require_effect(plan: DemoPlan, steering: SteeringEffect) -> None:
    """Raise unless steering changed what the model writes; the bundled latent must also do so as it is to.

    Raises:
        AttachError: with what was measured.
    """
    changed = sum(each.before != each.after for each in steering.continuations)
    if not changed or (plan.sae is None and steering.share_after <= steering.share_before):
        raise AttachError(
            f"Steering had no effect: {changed} of {len(steering.continuations)} continuations changed, and the share "
            f"of what the latent stands for went from {steering.share_before:.1%} to {steering.share_after:.1%}. "
            "Something steers nothing here: try --strength, or check the versions of torch and transformers."
        )


def choose_target(
    model: Any, tokenizer: Any, sae: SAEModel, plan: DemoPlan, choosing: Material, showing: Material
) -> tuple[Target, float]:
    """Pick the latent to show, of those that know a concept the one that steers best, and how hard to steer.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        sae: the SAE.
        plan: which concept or latent is wanted, if any.
        choosing: text to choose on.
        showing: text on which the choice will be shown.

    Raises:
        InputError: for a concept of text that has no ground truth, or if no latent is fit to be shown.
    """
    if plan.latent is not None or choosing.labels is None:
        if plan.concept is not None:
            raise InputError(f"--concept {plan.concept} needs Python source as text and no --latent; leave one out.")
        found: list[Target] = [firing_target(model, sae, choosing, plan.latent)]
    else:
        found = [*candidates(concept_scores(model, sae, choosing), plan.concept)]
    few = replace(plan.steering, prompts=12, new_tokens=min(plan.steering.new_tokens, 40))
    best, strength = choose_by_effect(model, tokenizer, sae, found, choosing, few)
    if isinstance(best, ConceptTarget):
        best = with_evidence(best, concept_scores(model, sae, showing))
    return best, strength


def subfolder_of(plan: DemoPlan) -> str:
    """Return the subfolder of the SAE: the default one belongs to the bundled SAEs only."""
    return plan.subfolder if plan.subfolder is not None else "" if plan.sae else bundled.DEFAULT_SAE


def load_model(plan: DemoPlan) -> tuple[Any, Any]:
    """Load the causal LM in float32 on one device, and its tokenizer, through transformers.

    Raises:
        MissingFileError: if there is no such model.
    """
    if plan.model is None:
        bundled.require_bundled()
    source = plan.model or str(bundled.MODEL)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        raise MissingFileError(
            f"No causal language model could be loaded from {source!r} ({str(error).splitlines()[0]}); expected a Hub "
            "id or a folder with config.json, weights and tokenizer."
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_sae(plan: DemoPlan) -> SAEModel:
    """Load the SAE through the public API.

    Raises:
        InputError: if a model is given without an SAE for it.
    """
    if plan.sae is None and plan.model is not None:
        raise InputError("--model was given without --sae; the bundled SAEs only fit the bundled model.")
    if plan.sae is None:
        bundled.require_bundled()
    return SAEModel.from_pretrained(plan.sae or str(bundled.SAES), subfolder_of(plan))


def read_material(plan: DemoPlan, model: Any, tokenizer: Any) -> Material:
    """Return the windows of text to measure on.

    Raises:
        MissingFileError: if the text file does not exist.
        InputError: if the text is empty or shorter than a window.
    """
    texts: Iterable[str]
    if plan.text is None:
        texts = corpus.texts("held_out")
    elif not plan.text.is_file():
        raise MissingFileError(f"--text {plan.text} is not a file; expected a text file in UTF-8.")
    else:
        texts = [plan.text.read_text(encoding="utf-8")]
    longest = int(getattr(model.config, "max_position_embeddings", plan.window))
    python = plan.text is None or plan.text.suffix == ".py"
    return cut(tokenizer, texts, window=min(plan.window, longest), windows=plan.windows, python=python)


def publish_and_reload(sae: SAEModel, folder: Path, facts: CardFacts | None = None) -> tuple[tuple[str, ...], bool]:
    """Write the SAE with its card to a folder and read it back.

    Returns:
        Names of the files, and whether every tensor came back bit by bit.
    """
    save(sae, folder, facts or read_facts(sae))
    again = SAEModel.from_pretrained(folder)
    ours, theirs = sae.state_dict(), again.state_dict()
    identical = ours.keys() == theirs.keys() and all(torch.equal(ours[key].cpu(), theirs[key].cpu()) for key in ours)
    return tuple(sorted(path.name for path in folder.iterdir())), identical
