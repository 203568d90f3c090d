"""SAEs as ordinary `transformers` models: configuration, base class, outputs."""

from ..functional.squared_error import squared_error
from .config import SAEConfig
from .keeping import KeepingSAE
from .model import SAEModel, architectures
from .objective import KeptObjective, Objective, Sparsity
from .output import SAEOutput, TrainingLoss
from .sae_set import SAESet

__all__ = [
    "KeepingSAE",
    "KeptObjective",
    "Objective",
    "SAEConfig",
    "SAEModel",
    "SAEOutput",
    "SAESet",
    "Sparsity",
    "TrainingLoss",
    "architectures",
    "squared_error",
]
