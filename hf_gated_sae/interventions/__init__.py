"""What to do with latents and activations, at which positions, under which condition: plain frozen data.

One file per verb; `hf_gated_sae.hooks.attach` carries them out. To add a verb, subclass `LatentEdit` (changes
latents), `Edit` (adds to the activation) or `Replacement` (takes its place) in a new file here.
"""

from .ablate import Ablate
from .ablate_site import AblateSite
from .base import Edit, Intervention, LatentEdit, Replacement, SiteRun, interventions
from .clamp import Clamp
from .positions import Positions, TokenContext, special_token_ids, special_token_mask
from .project_out import ProjectOut
from .scale import Scale
from .splice import Splice
from .steer import Steer

__all__ = [
    "Ablate",
    "AblateSite",
    "Clamp",
    "Edit",
    "Intervention",
    "LatentEdit",
    "Positions",
    "ProjectOut",
    "Replacement",
    "Scale",
    "SiteRun",
    "Splice",
    "Steer",
    "TokenContext",
    "interventions",
    "special_token_ids",
    "special_token_mask",
]
