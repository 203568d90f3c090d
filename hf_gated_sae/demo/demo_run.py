"""The steps of the demo; all its measurements are in one `DemoReport`, which the terminal and the plot show."""

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
"""Called with the name of the step and its progress, its number, and the number of steps."""
STEPS = ("load model and SAE", "read text", "splice", "find the latent", "ablate", "steer", "publish")


@dataclass(frozen=True)
class DemoPlan:
    """The options of the demo.

    Attributes:
        model: repository id or folder of a causal LM; the bundled one by default.
        sae: repository id or folder of an SAE; the bundled ones by default.
        subfolder: folder of the SAE inside `sae`.
        text: file with text; by default held-out source of the Python standard library.
        concept: the concept to show; chosen by measurement by default.
        latent: show this latent, whatever it means.
        strength: of steering, in units of the latent's recorded maximum; chosen by measurement by default.
        tokens: number of tokens to evaluate on; chosen by the size of the model by default.
        out: folder to publish the SAE into.
        window: tokens per window.
        effort: sizes of the measurements; chosen by the size of the model by default.
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
        """Check the options, before anything is loaded.

        Raises:
            InputError: if an option is invalid, or does not go with another one.
            MissingFileError: if the text does not exist.
            UnknownNameError: for a concept that does not exist.
        """
        if self.sae is None and self.model is not None:
            raise InputError("--model was given without --sae; the bundled SAEs only fit the bundled model.")
        if self.text is not None and not self.text.is_file():
            raise MissingFileError(f"--text {self.text} is not a file; expected a text file in UTF-8.")
        if self.concept is not None and self.concept not in CONCEPTS:
            raise unknown_name("concept", self.concept, CONCEPTS)
        if self.concept is not None and (self.latent is not None or not self.is_python):
            raise InputError(
                f"--concept {self.concept} needs Python source as text and no --latent; omit one of them."
            )
        if self.strength is not None and not 0 < self.strength < math.inf:
            raise InputError(
                f"--strength is {self.strength:g}; expected a number above 0, since the demo increases the latent's "
                "concept."
            )
        if self.tokens is not None and self.tokens < 2 * self.window:
            raise InputError(
                f"--tokens is {self.tokens}; expected {2 * self.window} or more: one window of {self.window} on which "
                "a latent is chosen and one on which it is shown."
            )
        if self.latent is not None and self.latent < 0:
            raise InputError(f"--latent is {self.latent}; expected the index of a latent, 0 or more.")

    @property
    def is_python(self) -> bool:
        """Whether the text is Python source, in which concepts have a ground truth."""
        return self.text is None or self.text.suffix == ".py"


@dataclass(frozen=True)
class DemoReport:
    """All measurements of the demo.

    Attributes:
        model, sae: names.
        fidelity: losses and metrics of the splice.
        target: the latent and its meaning.
        ablation: loss change on the target's tokens and on all others.
        steering: continuations before and after.
        published: the folder that was written; None if none was requested.
        files: names of the files in it.
        identical: whether the SAE loaded from it equals the published one bit for bit.
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
        plan: the options.
        progress: called at every step.

    Returns:
        The measurements.

    Raises:
        SAEError: if the options refer to something that does not exist, or do not fit together.
    """

    def report_step(step: str, detail: str = "") -> None:
        progress(f"{step}: {detail}" if detail else step, STEPS.index(step) + 1, len(STEPS))

    report_step("load model and SAE")
    sae = load_sae(plan)
    model, tokenizer = load_model(plan)
    sae = sae.to(model.device)
    effort = plan.effort or effort_for(model)
    report_step("read text")
    material = read_material(plan, model, tokenizer, effort)
    report_step("splice")
    # Steering strengths are in units of the latents' maxima; an SAE that has recorded none gets those of this text.
    fidelity = evaluate(
        model,
        sae,
        list(material.batches()),
        record=not sae.config.recorded_tokens,
        progress=lambda done: report_step("splice", f"{done:,} of {material.tokens:,} tokens"),
    )
    report_step("find the latent")
    choosing, showing = material.halves()
    target, strength = choose_target(model, tokenizer, sae, plan, effort, choosing, showing, report_step)
    report_step("ablate")
    ablation = measure_ablation(model, sae, target, showing)
    report_step("steer")
    how = replace(effort.showing, strength=strength)
    steering = measure_steering(model, tokenizer, sae, target, showing, how)
    require_effect(plan, steering)
    report_step("publish")
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
    """Raise unless steering changed the output; with the bundled SAE it must also increase the target's share.

    Raises:
        AttachError: with the measurements.
    """
    changed = sum(each.before != each.after for each in steering.continuations)
    if not changed or (plan.sae is None and steering.share_after <= steering.share_before):
        raise AttachError(
            f"Steering had no effect: {changed} of {len(steering.continuations)} continuations changed, and the share "
            f"of the latent's concept went from {steering.share_before:.1%} to {steering.share_after:.1%}. Try "
            "another --strength, or check the versions of torch and transformers."
        )


def choose_target(
    model: Any,
    tokenizer: Any,
    sae: SAEModel,
    plan: DemoPlan,
    effort: Effort,
    choosing: LabelledText,
    showing: LabelledText,
    report_step: Callable[[str, str], None],
) -> tuple[Target, float]:
    """Choose the latent to show, the best for steering of those that detect a concept, and the steering strength.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        sae: the SAE.
        plan: the requested concept, latent or strength, if any.
        effort: number of candidates, and how to try them.
        choosing: text to choose on.
        showing: text on which the choice will be shown.
        report_step: called at every trial.

    Raises:
        InputError: if no latent is suitable.
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
        lambda done, total: report_step("find the latent", f"{done} of {total} trials of steering"),
    )
    if isinstance(best, ConceptTarget):
        best = with_evidence(best, concept_scores(model, sae, showing))
    return best, strength


def subfolder_of(plan: DemoPlan) -> str:
    """Return the subfolder of the SAE; the default only applies to the bundled SAEs."""
    return plan.subfolder if plan.subfolder is not None else "" if plan.sae else bundled.DEFAULT_SAE


def load_model(plan: DemoPlan) -> tuple[Any, Any]:
    """Load the causal LM in float32 on one device, and its tokenizer, with transformers.

    Raises:
        MissingFileError: if the model does not exist.
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
        InputError: if the requested latent does not exist.
    """
    if plan.sae is None:
        bundled.require_bundled()
    sae: SAEModel = SAEModel.from_pretrained(plan.sae or str(bundled.SAES), subfolder_of(plan))
    if plan.latent is not None:
        sae.latent_indices([plan.latent])  # raises before the model is loaded, which takes longer
    return sae


def read_material(plan: DemoPlan, model: Any, tokenizer: Any, effort: Effort) -> LabelledText:
    """Return the windows of text to evaluate on.

    Args:
        plan: the text, and the number of tokens, if given.
        model: the causal LM; its longest context limits the windows.
        tokenizer: its tokenizer.
        effort: the default number of tokens, and windows per forward.

    Raises:
        InputError: if the text cannot be read, or is shorter than two windows.
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
        Names of the files, and whether every tensor is the same bit for bit.
    """
    save(sae, folder, facts or read_facts(sae))
    again = SAEModel.from_pretrained(folder)
    saved, loaded = sae.state_dict(), again.state_dict()
    identical = saved.keys() == loaded.keys() and all(
        torch.equal(saved[key].cpu(), loaded[key].cpu()) for key in saved
    )
    return tuple(sorted(path.name for path in folder.iterdir())), identical
