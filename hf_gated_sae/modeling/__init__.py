"""SAEs as ordinary `transformers` models: configuration, base class, outputs."""

from ..functional.squared_error import squared_error
from .config import SAEConfig
from .model import SAEModel, architectures
from .objective import KeptObjective, Objective, Sparsity
from .output import SAEOutput, TrainingLoss
from .topk_base import KeepingSAE

__all__ = [
    "KeepingSAE",
    "KeptObjective",
    "Objective",
    "SAEConfig",
    "SAEModel",
    "SAEOutput",
    "Sparsity",
    "TrainingLoss",
    "architectures",
    "squared_error",
]
