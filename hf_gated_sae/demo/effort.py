"""Sizes of the demo's measurements, chosen to take a few minutes on two cores for small and larger models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .effects import SteeringPlan

SMALL_MODEL = 20_000_000
"""Number of parameters up to which the thorough demo is fast enough on a CPU."""


@dataclass(frozen=True)
class Effort:
    """Sizes of the demo's measurements.

    Attributes:
        tokens: tokens to evaluate on; the latent is chosen on half of them and shown on the other half.
        candidates: number of latents to steer with, of which one is chosen.
        choosing: steering with each candidate.
        showing: steering with the chosen latent.
        rows: windows of text per forward; fewer for a large model, whose logits take memory.
    """

    tokens: int
    candidates: int
    choosing: SteeringPlan
    showing: SteeringPlan
    rows: int = 8


THOROUGH = Effort(24_576, 10, SteeringPlan(prompts=12, new_tokens=40), SteeringPlan(prompts=16, new_tokens=64))
QUICK = Effort(4_096, 4, SteeringPlan(prompts=8, new_tokens=24), SteeringPlan(prompts=8, new_tokens=40), rows=2)


def effort_for(model: Any) -> Effort:
    """Return the sizes for a model, by its number of parameters."""
    return THOROUGH if model.num_parameters() <= SMALL_MODEL else QUICK
