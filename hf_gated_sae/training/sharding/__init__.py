"""SAEs that do not fit one device: every process holds some of the latents."""

from .gathered import GatheredActivations
from .grid import Grid
from .latent_split import latents_of, load_part, new_part, own_part, split, whole_config
from .save_whole import save_whole

__all__ = [
    "GatheredActivations",
    "Grid",
    "latents_of",
    "load_part",
    "new_part",
    "own_part",
    "save_whole",
    "split",
    "whole_config",
]
