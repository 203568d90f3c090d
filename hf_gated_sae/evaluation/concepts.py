"""Measuring what latents mean: precision and recall of every latent for every concept with a ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ShapeError, unknown_name
from ..functional.short_repr import short_repr

CHUNK = 4096
"""Tokens per matrix product; counts below 2**24 are exact in float32."""


@dataclass(frozen=True)
class ConceptScore:
    """How well one latent, counted as active above a threshold, detects a concept.

    Attributes:
        concept: name of the concept.
        latent: index of the latent.
        share: threshold as a share of the latent's largest activation.
        threshold: the same as a value of the latent; active means strictly above.
        precision: of the tokens on which the latent is active, the share with the concept; NaN if it is never active.
        recall: of the tokens with the concept, the share on which the latent is active; NaN if no token has it.
        f1: harmonic mean of both.
        correlation: between "the latent is active" and "the token has the concept" (phi, or Matthews): 1 if they are
            the same, 0 for a latent that is independent of the concept; NaN if either never varies.
        prevalence: share of all tokens with the concept: the precision of an independent latent.
        chance_f1: F1 of a latent that is active equally often, but at random.
        on_tokens: number of tokens on which the latent is active.
        concept_tokens: number of tokens with the concept.
        tokens: number of all tokens.
    """

    concept: str
    latent: int
    share: float
    threshold: float
    precision: float
    recall: float
    f1: float
    correlation: float
    prevalence: float
    chance_f1: float
    on_tokens: int
    concept_tokens: int
    tokens: int

    __repr__ = short_repr


class ConceptScores:
    """Counts, in one pass, on how many tokens of each concept each latent is active.

    Args:
        concepts: names of the concepts, in the order of the label columns.
        max_activation: largest value of each latent ``[d_sae]``, from text other than that which is scored.
        shares: thresholds to try, as shares of that largest value; 0 for any value above 0.
    """

    def __init__(
        self, concepts: Sequence[str], max_activation: Tensor, shares: Sequence[float] = (0.0, 0.25, 0.5)
    ) -> None:
        if not concepts or not shares:
            raise InputError(
                f"Given {len(concepts)} concepts and {len(shares)} thresholds; expected at least one of each."
            )
        if any(not 0 <= share < 1 for share in shares):
            raise InputError(f"The shares are {list(shares)}; expected numbers from 0 up to, but not including, 1.")
        self.concepts = tuple(concepts)
        self.shares = tuple(shares)
        device = max_activation.device
        self.thresholds = torch.tensor(self.shares, device=device)[:, None] * max_activation.float()
        d_sae = len(max_activation)
        self.tokens = 0
        self._both = torch.zeros(len(shares), d_sae, len(concepts), dtype=torch.float64, device=device)
        self._on = torch.zeros(len(shares), d_sae, dtype=torch.float64, device=device)
        self._concept = torch.zeros(len(concepts), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            latents: ``[n, d_sae]``.
            labels: ``[n, n_concepts]`` bool.

        Raises:
            ShapeError: if their shapes do not match.
        """
        expected = (self._on.shape[1], len(self.concepts))
        given = (tuple(latents.shape), tuple(labels.shape))
        if given != ((len(latents), expected[0]), (len(latents), expected[1])):
            raise ShapeError(
                f"Given latents {list(latents.shape)} and labels {list(labels.shape)}; expected [n, {expected[0]}] "
                f"and [n, {expected[1]}] for the same n tokens."
            )
        self.tokens += len(latents)
        for some_latents, some_labels in zip(latents.split(CHUNK), labels.split(CHUNK), strict=True):
            truth = some_labels.to(device=self._on.device).float()
            self._concept += truth.sum(0, dtype=torch.float64)
            for index, threshold in enumerate(self.thresholds):
                on = (some_latents.to(threshold.device) > threshold).float()
                self._both[index] += (on.T @ truth).double()
                self._on[index] += on.sum(0, dtype=torch.float64)

    @property
    def precision(self) -> Tensor:
        """``[n_shares, d_sae, n_concepts]`` float64; NaN where a latent is never active."""
        return self._both / self._on[..., None]

    @property
    def recall(self) -> Tensor:
        """``[n_shares, d_sae, n_concepts]`` float64; NaN where no token has the concept."""
        return self._both / self._concept

    @property
    def f1(self) -> Tensor:
        """``[n_shares, d_sae, n_concepts]`` float64: harmonic mean of precision and recall."""
        return 2 * self._both / (self._on[..., None] + self._concept)

    @property
    def correlation(self) -> Tensor:
        """``[n_shares, d_sae, n_concepts]`` float64; NaN where latent or concept never varies."""
        return _correlation(self._both, self._on[..., None], self._concept, self.tokens)

    @property
    def prevalence(self) -> Tensor:
        """Share of tokens with each concept, ``[n_concepts]`` float64."""
        return self._concept / max(self.tokens, 1)

    def best(self, concept: str, *, most: int = 1) -> list[ConceptScore]:
        """Return the latents that correlate most with a concept, each at its best threshold, best first.

        They are ranked by correlation and not by F1, because a latent that is active nearly everywhere has a high F1
        for every frequent concept without detecting it.

        Args:
            concept: one of `concepts`.
            most: maximum number of latents.

        Returns:
            Scores with a correlation above 0; empty if there are none.

        Raises:
            UnknownNameError: if the concept is not among `concepts`.
        """
        column = self._column(concept)
        correlation, share = self.correlation[..., column].nan_to_num(-1.0).max(dim=0)
        order = correlation.argsort(descending=True, stable=True)[:most]
        return [
            self.score(concept, latent, int(share[latent])) for latent in order.tolist() if correlation[latent] > 0
        ]

    def score(self, concept: str, latent: int, share_index: int = 0) -> ConceptScore:
        """Return the score of one latent for one concept.

        Args:
            concept: one of `concepts`.
            latent: index of the latent.
            share_index: index into `shares`.
        """
        column = self._column(concept)
        both = self._both[share_index, latent, column].item()
        on, having = self._on[share_index, latent].item(), self._concept[column].item()
        prevalence, rate = having / max(self.tokens, 1), on / max(self.tokens, 1)
        return ConceptScore(
            concept=concept,
            latent=latent,
            share=self.shares[share_index],
            threshold=self.thresholds[share_index, latent].item(),
            precision=both / on if on else float("nan"),
            recall=both / having if having else float("nan"),
            f1=2 * both / (on + having) if on + having else float("nan"),
            correlation=_correlation(
                self._both[share_index, latent, column],
                self._on[share_index, latent],
                self._concept[column],
                self.tokens,
            ).item(),
            prevalence=prevalence,
            chance_f1=2 * prevalence * rate / (prevalence + rate) if prevalence + rate else float("nan"),
            on_tokens=int(on),
            concept_tokens=int(having),
            tokens=self.tokens,
        )

    def _column(self, concept: str) -> int:
        if concept not in self.concepts:
            raise unknown_name("concept", concept, self.concepts)
        return self.concepts.index(concept)


def _correlation(both: Tensor, on: Tensor, having: Tensor, tokens: int) -> Tensor:
    """Return the correlation of two binary properties from their counts."""
    return (tokens * both - on * having) / (on * (tokens - on) * having * (tokens - having)).sqrt()
