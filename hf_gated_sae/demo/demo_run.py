"""The demo, step by step; every number of it is in one `DemoReport`, which the terminal and the plot only show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import AttachError, InputError, MissingFileError, reason, unknown_name
from ..evaluation import FidelityReport, evaluate
from ..modeling import SAEModel
from ..modeling.transformers_settings import quiet_transformers
from ..publishing import CardFacts, read_facts, save
from . import bundled, corpus
from .concept_table import CONCEPTS
from .effects import AblationEffect, SteeringEffect, choose_by_effect, measure_ablation, measure_steering
from .effort import Effort, effort_for
from .labelled_text import LabelledText, cut
from .targets import ConceptTarget, Target, candidates, concept_scores, firing_target, with_evidence

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, with how much of it is done, the number of it, and the number of steps."""
STEPS = ("load model and SAE", "read text", "splice", "find the latent", "ablate", "steer", "publish")


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
        strength: how hard to steer, in units of the latent's recorded maximum; chosen by measurement by default.
        tokens: how many tokens to measure on; what suits the model by default.
        out: folder to publish the SAE into.
        window: tokens per window.
        effort: how much to do; what suits the model by default.
    """

    model: str | None = None
    sae: str | None = None
    subfolder: str | None = None
    text: Path | None = None
    concept: str | None = None
    latent: int | None = None
    strength: float | None = None
    tokens: int | None = None
    out: Path | None = None
    window: int = 256
    effort: Effort | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be shown, before anything is loaded.

        Raises:
            InputError: saying what was given, and what was expected.
            MissingFileError: if there is no such text.
            UnknownNameError: for a concept that does not exist.
        """
        if self.sae is None and self.model is not None:
            raise InputError("--model was given without --sae; the bundled SAEs only fit the bundled model.")
        if self.text is not None and not self.text.is_file():
            raise MissingFileError(f"--text {self.text} is not a file; expected a text file in UTF-8.")
        if self.concept is not None and self.concept not in CONCEPTS:
            raise unknown_name("concept", self.concept, CONCEPTS)
        if self.concept is not None and (self.latent is not None or not self.is_python):
            raise InputError(f"--concept {self.concept} needs Python source as text and no --latent; leave one out.")
        if self.strength is not None and not 0 < self.strength < math.inf:
            raise InputError(
                f"--strength is {self.strength:g}; expected a number above 0: the demo shows that there is more of "
                "what the latent stands for."
            )
        if self.tokens is not None and self.tokens < 2 * self.window:
            raise InputError(
                f"--tokens is {self.tokens}; expected {2 * self.window} or more, which is one window of {self.window} "
                "to choose a latent on and one to show it on."
            )
        if self.latent is not None and self.latent < 0:
            raise InputError(f"--latent is {self.latent}; expected the index of a latent, from 0 on.")

    @property
    def is_python(self) -> bool:
        """Whether the text is Python source, in which concepts have a ground truth."""
        return self.text is None or self.text.suffix == ".py"


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

    def tell(step: str, detail: str = "") -> None:
        progress(f"{step}: {detail}" if detail else step, STEPS.index(step) + 1, len(STEPS))

    tell("load model and SAE")
    sae = load_sae(plan)
    model, tokenizer = load_model(plan)
    sae = sae.to(model.device)
    effort = plan.effort or effort_for(model)
    tell("read text")
    material = read_material(plan, model, tokenizer, effort)
    tell("splice")
    # Steering measures in units of the latents' maxima; an SAE that brings none gets them from this text.
    fidelity = evaluate(
        model,
        sae,
        list(material.batches()),
        record=not sae.config.recorded_tokens,
        progress=lambda done: tell("splice", f"{done:,} of {material.tokens:,} tokens"),
    )
    tell("find the latent")
    choosing, showing = material.halves()
    target, strength = choose_target(model, tokenizer, sae, plan, effort, choosing, showing, tell)
    tell("ablate")
    ablation = measure_ablation(model, sae, target, showing)
    tell("steer")
    how = replace(effort.showing, strength=strength)
    steering = measure_steering(model, tokenizer, sae, target, showing, how)
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
    model: Any,
    tokenizer: Any,
    sae: SAEModel,
    plan: DemoPlan,
    effort: Effort,
    choosing: LabelledText,
    showing: LabelledText,
    tell: Callable[[str, str], None],
) -> tuple[Target, float]:
    """Pick the latent to show, of those that know a concept the one that steers best, and how hard to steer.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        sae: the SAE.
        plan: which concept, latent or strength is wanted, if any.
        effort: how many candidates to try, and how.
        choosing: text to choose on.
        showing: text on which the choice will be shown.
        tell: told of every trial.

    Raises:
        InputError: if no latent is fit to be shown.
    """
    if plan.latent is not None or choosing.labels is None:
        found: list[Target] = [firing_target(model, sae, choosing, plan.latent)]
    else:
        found = [*candidates(concept_scores(model, sae, choosing), plan.concept, effort.candidates)]
    best, strength = choose_by_effect(
        model,
        tokenizer,
        sae,
        found,
        choosing,
        replace(effort.choosing, strength=plan.strength),
        lambda done, total: tell("find the latent", f"{done} of {total} trials of steering"),
    )
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
        InputError: if the latent that is to be shown does not exist.
    """
    if plan.sae is None:
        bundled.require_bundled()
    sae: SAEModel = SAEModel.from_pretrained(plan.sae or str(bundled.SAES), subfolder_of(plan))
    if plan.latent is not None:
        sae.latent_indices([plan.latent])  # before the model, which takes longer, is loaded
    return sae


def read_material(plan: DemoPlan, model: Any, tokenizer: Any, effort: Effort) -> LabelledText:
    """Return the windows of text to measure on.

    Args:
        plan: which text, and how much of it, if it says so.
        model: the causal LM; its longest context bounds the windows.
        tokenizer: its tokenizer.
        effort: how much to read by default, and how many windows at a time.

    Raises:
        InputError: if the text is no text, or shorter than two windows.
    """
    texts: Iterable[str]
    if plan.text is None:
        texts = corpus.texts("held_out")
    else:
        try:
            texts = [plan.text.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--text {plan.text} cannot be read ({reason(error)}); expected text in UTF-8."
            ) from error
    window = min(plan.window, int(getattr(model.config, "max_position_embeddings", plan.window)))
    windows = max((plan.tokens or effort.tokens) // window, 2)
    material = cut(tokenizer, texts, window=window, windows=windows, python=plan.is_python, rows=effort.rows)
    if len(material.input_ids) < 2:
        raise InputError(f"The text is shorter than two windows of {window} tokens; give a longer text.")
    return material


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
