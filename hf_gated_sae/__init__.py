"""Sparse autoencoders as ordinary Hugging Face models, and a plug-in that hooks them into any causal LM.

Names are imported on first use, so that importing the package costs next to nothing beside torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .auto import register_stand_ins

__version__ = "0.1.0"

if TYPE_CHECKING:
    # For editors and type checkers; at run time `__getattr__` finds the names.
    from .architectures.abs_topk import AbsTopKSAE as AbsTopKSAE
    from .architectures.abs_topk import AbsTopKSAEConfig as AbsTopKSAEConfig
    from .architectures.batch_topk import BatchTopKSAE as BatchTopKSAE
    from .architectures.batch_topk import BatchTopKSAEConfig as BatchTopKSAEConfig
    from .architectures.cross_layer import CrossLayerSAE as CrossLayerSAE
    from .architectures.cross_layer import CrossLayerSAEConfig as CrossLayerSAEConfig
    from .architectures.gated import GatedSAE as GatedSAE
    from .architectures.gated import GatedSAEConfig as GatedSAEConfig
    from .architectures.gated_untied import UntiedGatedSAE as UntiedGatedSAE
    from .architectures.gated_untied import UntiedGatedSAEConfig as UntiedGatedSAEConfig
    from .architectures.glu import GLUSAE as GLUSAE
    from .architectures.glu import GLUSAEConfig as GLUSAEConfig
    from .architectures.group_max import GroupMaxSAE as GroupMaxSAE
    from .architectures.group_max import GroupMaxSAEConfig as GroupMaxSAEConfig
    from .architectures.jumprelu import JumpReLUSAE as JumpReLUSAE
    from .architectures.jumprelu import JumpReLUSAEConfig as JumpReLUSAEConfig
    from .architectures.matching_pursuit import MatchingPursuitSAE as MatchingPursuitSAE
    from .architectures.matching_pursuit import MatchingPursuitSAEConfig as MatchingPursuitSAEConfig
    from .architectures.standard import StandardSAE as StandardSAE
    from .architectures.standard import StandardSAEConfig as StandardSAEConfig
    from .architectures.tanh_relu import TanhReLUSAE as TanhReLUSAE
    from .architectures.tanh_relu import TanhReLUSAEConfig as TanhReLUSAEConfig
    from .architectures.temporal import TemporalSAE as TemporalSAE
    from .architectures.temporal import TemporalSAEConfig as TemporalSAEConfig
    from .architectures.topk import TopKSAE as TopKSAE
    from .architectures.topk import TopKSAEConfig as TopKSAEConfig
    from .catalog import SAESet as SAESet
    from .catalog import search as search
    from .evaluation import evaluate as evaluate
    from .hooks import ActivationShards as ActivationShards
    from .hooks import attach as attach
    from .hooks import attribute as attribute
    from .hooks import capture as capture
    from .hooks import harvest as harvest
    from .hooks import save_activations as save_activations
    from .interventions import Ablate as Ablate
    from .interventions import AblateSite as AblateSite
    from .interventions import Cap as Cap
    from .interventions import Clamp as Clamp
    from .interventions import Floor as Floor
    from .interventions import InterventionPlan as InterventionPlan
    from .interventions import Patch as Patch
    from .interventions import ProjectOut as ProjectOut
    from .interventions import Scale as Scale
    from .interventions import Splice as Splice
    from .interventions import Steer as Steer
    from .interventions import TokenIds as TokenIds
    from .modeling import SAEConfig as SAEConfig
    from .modeling import SAEModel as SAEModel
    from .modeling import SAEOutput as SAEOutput
    from .sites import Site as Site
    from .sites import resolve as resolve

_HOMES = {
    "evaluation": ("evaluate",),
    "hooks": ("ActivationShards", "attach", "attribute", "capture", "harvest", "save_activations"),
    "catalog": ("SAESet", "search"),
    "interventions": (
        *("Ablate", "AblateSite", "Cap", "Clamp", "Floor", "InterventionPlan", "Patch"),
        *("ProjectOut", "Scale", "Splice", "Steer", "TokenIds"),
    ),
    "modeling": ("SAEConfig", "SAEModel", "SAEOutput"),
    "sites": ("Site", "resolve"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    if name.endswith(("SAE", "SAEConfig")):  # an architecture: asked of the registry, so that a new one is one file
        from .architectures import architectures

        for model in architectures.values():
            for candidate in (model, model.config_class):
                if candidate.__name__ == name:
                    return candidate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_stand_ins()
