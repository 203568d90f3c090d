"""A latent with a measured meaning: the latent, what it stands for, and how well the two agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, unknown_name
from ..evaluation import ConceptScores
from ..hooks import capture
from ..modeling import SAEModel
from .concepts import concept_share
from .material import Material

# Concepts that fill a stretch of text, so that steering towards them shows; the first that the SAE knows is chosen.
SHOWN_FIRST = ("comment", "docstring", "string", "import_line", "decorator")
WELL_KNOWN = 0.5  # F1 from which a latent counts as knowing a concept
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
    def inside(self, material: Material) -> Tensor:
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
    """A concept of Python source, decided by a lexer and not by the SAE."""

    def inside(self, material: Material) -> Tensor:
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

    def inside(self, material: Material) -> Tensor:
        """Return the tokens that follow one on which the latent fires: those that it can help to predict."""
        fires = torch.cat([self.firing(batch["input_ids"]) for batch in material.batches(8)])
        return torch.cat([torch.zeros_like(fires[:, :1]), fires[:, :-1]], dim=1)

    def share(self, ids: Tensor, prompt: int, text: str, prompt_text: str) -> float:
        """Return the share of the continuation's tokens on which the latent fires."""
        return self.firing(ids.unsqueeze(0))[0, prompt:].float().mean().item()


def choose_target(model: Any, sae: SAEModel, material: Material, *, concept: str | None, latent: int | None) -> Target:
    """Pick the latent to show.

    Args:
        model: the causal LM.
        sae: the SAE.
        material: text, labelled if it is Python.
        concept: the concept to show; by default the first of `SHOWN_FIRST` that a latent knows, else the best known.
        latent: show this latent instead, standing for the tokens on which it fires.

    Returns:
        The target.

    Raises:
        InputError: for a concept that the text has no ground truth for, or if no latent is fit to be shown.
    """
    if latent is not None or material.labels is None:
        if concept is not None:
            raise InputError(
                f"--concept {concept} needs Python source as text and no --latent; leave one of them out."
            )
        return _firing_target(model, sae, material, latent)
    if concept is not None and concept not in material.names:
        raise unknown_name("concept", concept, material.names)
    scores = ConceptScores(material.names, sae.max_activation)
    for labels, latents in _latents(model, sae, material):
        scores.update(latents, labels)
    best = {name: found[0] for name in ([concept] if concept else material.names) if (found := scores.best(name))}
    if not best:
        raise InputError(f"No latent of this SAE fires on {concept or 'any concept'} in this text; try --latent.")
    known = [name for name in SHOWN_FIRST if name in best and best[name].f1 >= WELL_KNOWN]
    name = concept or (known[0] if known else max(best, key=lambda key: best[key].f1))
    winner = best[name]
    return ConceptTarget(
        latent=winner.latent,
        name=name,
        evidence=f"on above {winner.threshold:.3g}: precision {winner.precision:.0%}, recall {winner.recall:.0%} over "
        f"{winner.tokens:,} tokens, {winner.prevalence:.1%} of which are {name}",
    )


def _latents(model: Any, sae: SAEModel, material: Material) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels ``[T, n_concepts]`` and latents ``[T, d_sae]`` of the material, batch by batch."""
    assert material.labels is not None
    for batch, labels in zip(material.batches(8), material.labels.split(8), strict=True):
        yield labels.flatten(0, 1), capture(model, sae, **_on(model, batch))[sae].flatten(0, 1)


def _on(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in batch.items()}


def _firing_target(model: Any, sae: SAEModel, material: Material, latent: int | None) -> FiringTarget:
    """Return the given latent, or the one of moderate density that writes most to the residual stream."""
    fired = torch.zeros(sae.config.d_sae, device=sae.device)
    strength = torch.zeros_like(fired)
    for batch in material.batches(8):
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
