"""Measuring the effects of ablating a latent and of steering with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..hooks import attach
from ..interventions.ablate import Ablate
from ..interventions.steer import Steer
from ..modeling import SAEModel
from .labelled_text import LabelledText
from .targets import Target

STRENGTHS = (1.0, 2.0)
"""Steering strengths to choose from, in units of the latent's recorded maximum activation."""


@dataclass(frozen=True)
class AblationEffect:
    """Next-token loss in nats per token, inside and outside the target's tokens.

    Attributes:
        inside_clean, inside_ablated: mean loss of tokens inside.
        outside_clean, outside_ablated: mean loss of all other tokens.
        inside_tokens, outside_tokens: their numbers.
    """

    inside_clean: float
    inside_ablated: float
    outside_clean: float
    outside_ablated: float
    inside_tokens: int
    outside_tokens: int


@dataclass(frozen=True)
class Continuation:
    """One prompt, continued before and after steering.

    Attributes:
        prompt, before, after: text.
        share_before, share_after: the target's share of each continuation.
    """

    prompt: str
    before: str
    after: str
    share_before: float
    share_after: float


@dataclass(frozen=True)
class SteeringEffect:
    """Several prompts, each continued without and with steering with the same random numbers.

    Attributes:
        strength: in units of the latent's recorded maximum activation.
        continuations: one per prompt.
    """

    strength: float
    continuations: list[Continuation]

    @property
    def share_before(self) -> float:
        """Mean share without steering."""
        return sum(c.share_before for c in self.continuations) / len(self.continuations)

    @property
    def share_after(self) -> float:
        """Mean share with steering."""
        return sum(c.share_after for c in self.continuations) / len(self.continuations)

    @property
    def clearest(self) -> Continuation:
        """The continuation with the largest change, as an example of the effect."""
        return max(self.continuations, key=lambda c: c.share_after - c.share_before)


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor) -> Tensor:
    """Return the loss of every token but the first, ``[B, S - 1]`` in nats."""
    ids = input_ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()


def measure_ablation(model: Any, sae: SAEModel, target: Target, material: LabelledText) -> AblationEffect:
    """Ablate the target's latent everywhere and compare the losses.

    Args:
        model: the causal LM.
        sae: the SAE.
        target: the latent and its tokens.
        material: text.

    Returns:
        The losses.
    """
    inside = target.inside(material)[:, 1:]
    before = torch.cat([token_losses(model, batch["input_ids"]) for batch in material.batches()])
    with attach(model, Ablate(sae, [target.latent]), check=False):  # the fit was checked when the splice was measured
        after = torch.cat([token_losses(model, batch["input_ids"]) for batch in material.batches()])
    return AblationEffect(
        inside_clean=before[inside].mean().item(),
        inside_ablated=after[inside].mean().item(),
        outside_clean=before[~inside].mean().item(),
        outside_ablated=after[~inside].mean().item(),
        inside_tokens=int(inside.sum()),
        outside_tokens=int((~inside).sum()),
    )


@dataclass(frozen=True)
class SteeringPlan:
    """Settings of steering and of sampling continuations.

    Attributes:
        strength: in units of the latent's recorded maximum activation; None to choose it by its effect.
        prompts: number of prompts.
        prompt_tokens, new_tokens: lengths.
        temperature: of sampling; 0 is greedy.
        seed: of sampling, the same without and with steering.
    """

    strength: float | None = None
    prompts: int = 16
    prompt_tokens: int = 48
    new_tokens: int = 64
    temperature: float = 0.7
    seed: int = 0


def measure_steering(
    model: Any, tokenizer: Any, sae: SAEModel, target: Target, material: LabelledText, plan: SteeringPlan
) -> SteeringEffect:
    """Continue prompts with and without steering.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        sae: the SAE.
        target: the latent and its meaning.
        material: text; prompts are beginnings of windows that end outside the target's tokens.
        plan: settings of steering and sampling.

    Returns:
        The continuations and their shares.
    """
    prompts = _prompts(target, material, plan)
    return _steered(model, tokenizer, sae, target, prompts, _continue(model, tokenizer, prompts, plan), plan)


def _steered(
    model: Any, tokenizer: Any, sae: SAEModel, target: Target, prompts: Tensor, before: Tensor, plan: SteeringPlan
) -> SteeringEffect:
    """Continue prompts with steering, and compare with the continuations without."""
    strength = STRENGTHS[0] if plan.strength is None else plan.strength
    steer = Steer(sae, target.latent, strength=strength, positions="generated")
    with attach(model, steer, check=False):  # the fit was checked when the splice was measured
        after = _continue(model, tokenizer, prompts, plan)
    continuations = []
    for prompt, plain, steered in zip(prompts, before, after, strict=True):
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        pair = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (plain, steered)]
        shares = [
            target.share(ids, len(prompt), whole, text) for ids, whole in zip((plain, steered), pair, strict=True)
        ]
        continuations.append(Continuation(text, pair[0][len(text) :], pair[1][len(text) :], shares[0], shares[1]))
    return SteeringEffect(strength=strength, continuations=continuations)


def _prompts(target: Target, material: LabelledText, plan: SteeringPlan) -> Tensor:
    """Return beginnings of windows from all of the material, ``[N, prompt_tokens]``, that end outside the target.

    A prompt that ends inside a comment, for example, would be continued inside it with or without steering.
    """
    outside = (~target.inside(material)[:, plan.prompt_tokens - 1]).nonzero().squeeze(-1)
    if not len(outside):
        raise InputError(f"Every prompt of this text ends inside {target.name}; give another text, or another latent.")
    spread = torch.linspace(0, len(outside) - 1, min(plan.prompts, len(outside))).round().long()
    return material.input_ids[outside[spread], : plan.prompt_tokens]


def _continue(model: Any, tokenizer: Any, prompts: Tensor, plan: SteeringPlan) -> Tensor:
    """Return prompts with their continuations, ``[N, prompt_tokens + new_tokens]``."""
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        return model.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=plan.new_tokens,
            min_new_tokens=plan.new_tokens,
            do_sample=plan.temperature > 0,
            temperature=plan.temperature or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        ).cpu()


def choose_by_effect(
    model: Any,
    tokenizer: Any,
    sae: SAEModel,
    targets: Sequence[Target],
    material: LabelledText,
    plan: SteeringPlan,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Target, float]:
    """Return the target whose share increases most when steering with its latent, and the strength for it.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        sae: the SAE.
        targets: candidates.
        material: text other than that on which the choice is shown.
        plan: settings of steering; a few prompts suffice. If it has a strength, only that one is tried.
        progress: called before each trial with the number of finished and of all trials.
    """
    strengths = STRENGTHS if plan.strength is None else (plan.strength,)
    if len(targets) * len(strengths) == 1:
        return targets[0], strengths[0]
    plain: dict[tuple[int, ...], Tensor] = {}  # candidates for one concept have the same prompts
    best: tuple[float, Target, float] | None = None
    for number, target in enumerate(targets):
        prompts = _prompts(target, material, plan)
        key = tuple(prompts.flatten().tolist())
        for trial, strength in enumerate(strengths, number * len(strengths)):
            progress(trial, len(targets) * len(strengths))
            if key not in plain:
                plain[key] = _continue(model, tokenizer, prompts, plan)
            here = replace(plan, strength=strength)
            found = _steered(model, tokenizer, sae, target, prompts, plain[key], here)
            effect = found.share_after - found.share_before
            if best is None or effect > best[0]:
                best = effect, target, strength
    assert best is not None  # there is a target
    return best[1], best[2]
