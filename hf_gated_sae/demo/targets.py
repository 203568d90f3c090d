"""A latent with a measured meaning: the latent, what it stands for, and how well the two agree."""

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

KNOWN_F1, KNOWN_PRECISION = 0.3, 0.6  # from which a latent counts as standing for a concept
DENSITY = (1e-3, 5e-2)  # a latent without a label should be neither dead nor always on


@dataclass(frozen=True)
class Target(ABC):
    """One latent and the tokens it stands for.

    Attributes:
        latent: its index.
        name: what it stands for.
        evidence: how that was measured, in words.
    """

    latent: int
    name: str
    evidence: str

    @abstractmethod
    def inside(self, material: LabelledText) -> Tensor:
        """Return which tokens it stands for, ``[N, S]`` bool."""

    @abstractmethod
    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of a continuation that it stands for.

        Args:
            ids: tokens of prompt and continuation, ``[S]``.
            prompt: number of tokens of the prompt.
            text: both, decoded.
            prompt_text: the prompt, decoded.
        """


@dataclass(frozen=True)
class ConceptTarget(Target):
    """A concept of Python source, decided by a lexer and not by the SAE.

    Attributes:
        threshold: share of its maximum above which the latent counts as on.
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
    """The tokens on which the latent itself fires in the untouched model, where no ground truth is at hand."""

    firing: Callable[[Tensor], Tensor]

    def inside(self, material: LabelledText) -> Tensor:
        """Return the tokens that follow one on which the latent fires: those that it can help to predict."""
        fires = torch.cat([self.firing(batch["input_ids"]) for batch in material.batches()])
        return torch.cat([torch.zeros_like(fires[:, :1]), fires[:, :-1]], dim=1)

    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of the continuation's tokens on which the latent fires."""
        return self.firing(ids.unsqueeze(0))[0, prompt:].float().mean().item()


def concept_scores(model: Any, sae: SAEModel, material: LabelledText) -> ConceptScores:
    """Return how well every latent tells every concept on labelled text."""
    scores = ConceptScores(material.names, sae.max_activation)
    for labels, latents in _latents(model, sae, material):
        scores.update(latents, labels)
    return scores


def candidates(scores: ConceptScores, concept: str | None, most: int) -> list[ConceptTarget]:
    """Return latents that know a concept, best first.

    Args:
        scores: measured on labelled text.
        concept: the concept; by default every concept that a latent knows well, else the one that is known best.
        most: how many at most; of one concept, half as many. Detecting and causing are not the same, so that the one
            that steers best has to be found among them.

    Raises:
        UnknownNameError: if there is no such concept.
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
    """Return a latent that stands for the tokens on which it fires, for want of a ground truth.

    Args:
        model: the causal LM.
        sae: the SAE.
        material: text.
        latent: which one; by default the one of moderate density that writes most to the residual stream.

    Raises:
        InputError: if no latent fires moderately often.
        LatentIndexError: if there is no such latent.
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
