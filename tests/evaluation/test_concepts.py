from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError, ShapeError, UnknownNameError
from hf_gated_sae.evaluation import ConceptScores

NAMES = ("number", "string")
SHARES = (0.0, 0.25, 0.5)


def example(seed: int, tokens: int = 30, d_sae: int = 6):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.relu(torch.randn(tokens, d_sae, generator=generator))
    latents[:, 0] = 0  # it never fires
    labels = torch.rand(tokens, len(NAMES), generator=generator) < 0.3
    return latents, labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 30))
def test_scores_equal_a_naive_count(seed, cut):
    latents, labels = example(seed)
    maxima = latents.amax(0)
    scores = ConceptScores(NAMES, maxima, SHARES)
    scores.update(latents[:cut], labels[:cut])
    scores.update(latents[cut:], labels[cut:])
    for index, share in enumerate(SHARES):
        for latent in range(latents.shape[1]):
            for column, name in enumerate(NAMES):
                on = [value > share * maxima[latent].item() for value in latents[:, latent].tolist()]
                truth = labels[:, column].tolist()
                both = sum(a and b for a, b in zip(on, truth, strict=True))
                score = scores.score(name, latent, index)
                assert (score.on_tokens, score.concept_tokens, score.tokens) == (sum(on), sum(truth), 30)
                ones = torch.tensor([on, truth], dtype=torch.float64)
                constant = ones.std(dim=1, correction=0).min() == 0
                expected = {
                    "correlation": math.nan if constant else torch.corrcoef(ones)[0, 1].item(),
                    "precision": both / sum(on) if any(on) else math.nan,
                    "recall": both / sum(truth) if any(truth) else math.nan,
                    "f1": 2 * both / (sum(on) + sum(truth)) if any(on) or any(truth) else math.nan,
                    "prevalence": sum(truth) / 30,
                }
                for what, value in expected.items():
                    assert getattr(score, what) == pytest.approx(value, nan_ok=True), what
                    if what != "prevalence":
                        table = getattr(scores, what)[index, latent, column].item()
                        assert table == pytest.approx(value, nan_ok=True), what
                assert score.threshold == pytest.approx(share * maxima[latent].item())


def test_the_best_latent_is_the_one_that_was_made_for_the_concept():
    latents, labels = example(3, tokens=500)
    latents[:, 4] = torch.where(labels[:, 1], 2.0, 0.4)  # detects strings, but only above a fifth of its maximum
    scores = ConceptScores(NAMES, latents.amax(0), SHARES)
    scores.update(latents, labels)
    first, second = scores.best("string", most=2)
    assert (first.latent, first.share) == (4, 0.25)
    assert first.precision == first.recall == first.f1 == 1.0
    assert second.f1 < first.f1 and second.latent != 4
    assert first.prevalence == pytest.approx(labels[:, 1].float().mean().item())
    assert first.prevalence < first.precision


def test_an_uninformative_latent_scores_as_chance_predicts():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(40_000, 1, generator=generator) < 0.1
    latents = (torch.rand(40_000, 1, generator=generator) < 0.2).float()
    scores = ConceptScores(["c"], torch.ones(1), [0.0])
    scores.update(latents, labels)
    score = scores.score("c", 0)
    assert score.precision == pytest.approx(score.prevalence, abs=0.01)
    assert score.f1 == pytest.approx(score.chance_f1, abs=0.01)


def test_a_latent_that_is_on_everywhere_is_not_best_for_a_frequent_concept():
    labels = (torch.arange(1000) % 5 < 2).unsqueeze(1)
    latents = torch.ones(1000, 2)
    latents[:, 1] = labels[:, 0] & (torch.arange(1000) % 10 < 3)  # precise, but misses some
    latents[0, 0] = 0
    scores = ConceptScores(["c"], torch.ones(2), [0.0])
    scores.update(latents, labels)
    everywhere, precise = scores.score("c", 0), scores.score("c", 1)
    assert everywhere.f1 == pytest.approx(everywhere.chance_f1, abs=0.01) and everywhere.recall > precise.recall
    assert abs(everywhere.correlation) < 0.05
    assert scores.best("c")[0] == precise and precise.precision == 1.0


def test_latents_that_never_hit_are_not_best():
    scores = ConceptScores(NAMES, torch.ones(3))
    latents = torch.zeros(10, 3)
    latents[:5, 1] = 1.0
    labels = torch.zeros(10, 2, dtype=torch.bool)
    labels[:5, 0] = True
    scores.update(latents, labels)
    assert [score.latent for score in scores.best("number", most=3)] == [1]
    assert scores.best("string") == []


def test_counts_stay_exact_beyond_one_chunk():
    scores = ConceptScores(["c"], torch.ones(1), [0.0])
    scores.update(torch.ones(10_001, 1), torch.ones(10_001, 1, dtype=torch.bool))
    assert scores.score("c", 0).on_tokens == 10_001


def test_wrong_input_is_explained():
    scores = ConceptScores(NAMES, torch.ones(3))
    with pytest.raises(ShapeError, match=r"\[5, 4\]"):
        scores.update(torch.ones(5, 4), torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="same n tokens"):
        scores.update(torch.ones(5, 3), torch.ones(6, 2, dtype=torch.bool))
    with pytest.raises(UnknownNameError, match="Did you mean 'number'"):
        scores.best("numbr")
    with pytest.raises(InputError, match="up to, but not including, 1"):
        ConceptScores(NAMES, torch.ones(3), [0.5, 1.0])
    with pytest.raises(InputError, match="at least one of each"):
        ConceptScores([], torch.ones(3))
