"""How much the demo does: a few minutes on two cores, for a model of one million parameters or of a hundred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .effects import SteeringPlan

SMALL_MODEL = 20_000_000
"""Parameters up to which a model is quick enough for the thorough demo on a CPU."""


@dataclass(frozen=True)
class Effort:
    """How much text is measured on, and how much is written.

    Attributes:
        tokens: tokens to measure on; half of them choose the latent, the other half shows it.
        candidates: latents that are steered with, to choose the one that is shown.
        choosing: how each of them is tried.
        showing: how the chosen one is shown.
        rows: windows of text that the model is given at a time; few of a large model, whose logits take memory.
    """

    tokens: int
    candidates: int
    choosing: SteeringPlan
    showing: SteeringPlan
    rows: int = 8


THOROUGH = Effort(24_576, 10, SteeringPlan(prompts=12, new_tokens=40), SteeringPlan(prompts=16, new_tokens=64))
QUICK = Effort(4_096, 4, SteeringPlan(prompts=8, new_tokens=24), SteeringPlan(prompts=8, new_tokens=40), rows=2)


def effort_for(model: Any) -> Effort:
    """Return how much to do with a model."""
    return THOROUGH if model.num_parameters() <= SMALL_MODEL else QUICK
