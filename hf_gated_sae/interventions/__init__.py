"""What to do with latents and activations, at which positions, under which condition: plain frozen data.

One file per verb; `hf_gated_sae.hooks.attach` carries them out. To add a verb, subclass `LatentEdit` (changes
latents), `Edit` (adds to the activation) or `Replacement` (takes its place) in a new file here.
"""

from .ablate import Ablate
from .ablate_site import AblateSite
from .base import Conditional, Edit, Intervention, LatentEdit, Replacement, Targeted, interventions
from .cap import Cap
from .clamp import Clamp
from .floor import Floor
from .model_call import ModelCall, SiteCall
from .patch import Patch
from .plan import InterventionPlan
from .positions import Positions, TokenContext, TokenIds
from .project_out import ProjectOut
from .scale import Scale
from .special_tokens import special_ids_for, special_token_ids, special_token_mask
from .splice import Splice
from .steer import Steer

__all__ = [
    "Ablate",
    "AblateSite",
    "ModelCall",
    "Cap",
    "Clamp",
    "Conditional",
    "Edit",
    "Floor",
    "Intervention",
    "InterventionPlan",
    "LatentEdit",
    "Patch",
    "Positions",
    "ProjectOut",
    "Replacement",
    "Scale",
    "SiteCall",
    "Splice",
    "Steer",
    "Targeted",
    "TokenContext",
    "TokenIds",
    "interventions",
    "special_ids_for",
    "special_token_ids",
    "special_token_mask",
]
