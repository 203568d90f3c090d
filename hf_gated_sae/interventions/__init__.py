"""Interventions as frozen data: what to do with latents or activations, at which positions, under which condition.

One file per verb; `hf_gated_sae.hooks.attach` applies them. To add a verb, subclass `LatentEdit` (changes latents),
`Edit` (adds to the activation) or `Replacement` (replaces the activation) in a new file here, named after the
class; `hf_gated_sae` exports it.
"""

import importlib
from typing import Any

from ..exports import exported
from .base import Conditional, Edit, Intervention, LatentEdit, Replacement, Targeted, interventions
from .model_call import ModelCall, SiteCall
from .plan import InterventionPlan
from .positions import Positions, TokenContext, TokenIds
from .special_tokens import special_ids_for, special_token_ids, special_token_mask

__all__ = [
    "ModelCall",
    "Conditional",
    "Edit",
    "Intervention",
    "InterventionPlan",
    "LatentEdit",
    "Positions",
    "Replacement",
    "SiteCall",
    "Targeted",
    "TokenContext",
    "TokenIds",
    "interventions",
    "special_ids_for",
    "special_token_ids",
    "special_token_mask",
]


def __getattr__(name: str) -> Any:
    """Return a verb, whose file is imported when it is first asked for."""
    module = exported().get(name, "")
    if module.startswith("interventions."):
        return getattr(importlib.import_module(f"hf_gated_sae.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
