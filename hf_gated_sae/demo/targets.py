"""Choosing a latent with a measured meaning, to ablate and to steer with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..evaluation import ConceptScores
from ..hooks import capture
from ..modeling import SAEModel
from .labelled_text import LabelledText
from .token_concepts import concept_share

KNOWN_F1, KNOWN_PRECISION = 0.3, 0.6  # smallest values at which a latent counts as a detector of a concept
DENSITY = (1e-3, 5e-2)  # a latent without a label should be neither dead nor always on


@dataclass(frozen=True)
class Target(ABC):
    """One latent and its meaning, as a set of tokens.

    Attributes:
        latent: its index.
        name: of its meaning.
        evidence: how that was measured, in words.
    """

    latent: int
    name: str
    evidence: str

    @abstractmethod
    def inside(self, material: LabelledText) -> Tensor:
        """Return which tokens have the meaning, ``[N, S]`` bool."""

    @abstractmethod
    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of a continuation that has the meaning.

        Args:
            ids: tokens of prompt and continuation, ``[S]``.
            prompt: number of tokens of the prompt.
            text: both, decoded.
            prompt_text: the prompt, decoded.
        """


@dataclass(frozen=True)
class ConceptTarget(Target):
    """A latent and a concept of Python source, which a lexer determines independently of the SAE.

    Attributes:
        threshold: share of its maximum above which the latent counts as active.
    """

    threshold: float

    def inside(self, material: LabelledText) -> Tensor:
        """Return the tokens that have the concept."""
        assert material.labels is not None
        return material.labels[..., material.names.index(self.name)]

    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of the continuation's characters that have the concept."""
        return concept_share(text, len(prompt_text), self.name)


@dataclass(frozen=True)
class FiringTarget(Target):
    """A latent and the tokens on which it fires in the model without edits, for text without ground truth.

    Attributes:
        firing: returns on which tokens the latent fires.
    """

    firing: Callable[[Tensor], Tensor]

    def inside(self, material: LabelledText) -> Tensor:
        """Return the tokens after those on which the latent fires, whose prediction it can affect."""
        fires = torch.cat([self.firing(batch["input_ids"]) for batch in material.batches()])
        return torch.cat([torch.zeros_like(fires[:, :1]), fires[:, :-1]], dim=1)

    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of the continuation's tokens on which the latent fires."""
        return self.firing(ids.unsqueeze(0))[0, prompt:].float().mean().item()


def concept_scores(model: Any, sae: SAEModel, material: LabelledText) -> ConceptScores:
    """Return how well every latent detects every concept in labelled text."""
    scores = ConceptScores(material.names, sae.max_activation)
    for labels, latents in _latents(model, sae, material):
        scores.update(latents, labels)
    return scores


def candidates(scores: ConceptScores, concept: str | None, most: int) -> list[ConceptTarget]:
    """Return latents that detect a concept, best first.

    Args:
        scores: measured on labelled text.
        concept: the concept; by default all that a latent detects well, or else the one that is detected best.
        most: maximum number; half of it for a single concept. A latent that detects a concept need not cause it, so
            the best for steering has to be found among them.

    Raises:
        UnknownNameError: if the concept does not exist.
        InputError: if no latent fires on it.
    """
    if concept is not None and concept not in scores.concepts:
        raise unknown_name("concept", concept, scores.concepts)
    if concept is not None:
        found = scores.best(concept, most=max(most // 2, 1))
    else:
        every = [score for name in scores.concepts for score in scores.best(name)]
        every.sort(key=lambda score: score.f1, reverse=True)
        known = [s for s in every if s.f1 >= KNOWN_F1 and s.precision >= KNOWN_PRECISION]
        found = (known or every[:1])[:most]
    if not found:
        raise InputError(f"No latent of this SAE fires on {concept or 'any concept'} in this text; try --latent.")
    return [ConceptTarget(score.latent, score.concept, "", score.share) for score in found]


def with_evidence(target: ConceptTarget, scores: ConceptScores) -> ConceptTarget:
    """Return the target with its precision and recall on text that it was not chosen on.

    Args:
        target: the latent and its concept.
        scores: measured on that text.
    """
    found = scores.score(target.name, target.latent, scores.shares.index(target.threshold))
    evidence = (
        f"on above {found.threshold:.3g}, it has precision {found.precision:.0%} and recall {found.recall:.0%} for "
        f"{target.name}, which {found.prevalence:.1%} of {found.tokens:,} tokens are"
    )
    return replace(target, evidence=evidence)


def _latents(model: Any, sae: SAEModel, material: LabelledText) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels ``[T, n_concepts]`` and latents ``[T, d_sae]`` of the material, batch by batch."""
    assert material.labels is not None
    for batch, labels in zip(material.batches(), material.labels.split(material.rows), strict=True):
        yield labels.flatten(0, 1), capture(model, sae, **_on(model, batch))[sae].flatten(0, 1)


def _on(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in batch.items()}


def firing_target(model: Any, sae: SAEModel, material: LabelledText, latent: int | None) -> FiringTarget:
    """Return a latent with the tokens on which it fires as its meaning, for text without ground truth.

    Args:
        model: the causal LM.
        sae: the SAE.
        material: text.
        latent: its index; by default the latent of moderate density with the largest mean output.

    Raises:
        InputError: if no latent fires moderately often.
        LatentIndexError: if the latent does not exist.
    """
    fired = torch.zeros(sae.config.d_sae, device=sae.device)
    strength = torch.zeros_like(fired)
    for batch in material.batches():
        latents = capture(model, sae, **_on(model, batch))[sae].flatten(0, 1)
        fired += (latents > 0).sum(0)
        strength += latents.sum(0)
    density = fired / material.tokens
    if latent is None:
        fit = (density >= DENSITY[0]) & (density <= DENSITY[1])
        if not fit.any():
            raise InputError("No latent of this SAE fires on 0.1 to 5 % of this text; choose one with --latent.")
        latent = int(torch.where(fit, strength * sae.W_dec.norm(dim=-1), -1.0).argmax())
    else:
        sae.latent_indices([latent])
    chosen = latent

    def firing(ids: Tensor) -> Tensor:
        return (capture(model, sae, input_ids=ids.to(model.device))[sae][..., chosen] > 0).to(ids.device)

    return FiringTarget(
        latent=chosen,
        name=f"latent {chosen} fires",
        evidence=f"fires on {density[chosen]:.2%} of {material.tokens:,} tokens; no ground truth for this text",
        firing=firing,
    )
