"""SAEs as ordinary `transformers` models: configuration, base class, outputs."""

from ..functional.squared_error import squared_error
from .architecture_registry import architectures
from .config import SAEConfig
from .model import SAEModel
from .objective import Objective, Sparsity, TopKObjective
from .output import SAEOutput, TrainingLoss
from .topk_base import TopKBaseSAE

__all__ = [
    "TopKBaseSAE",
    "TopKObjective",
    "Objective",
    "SAEConfig",
    "SAEModel",
    "SAEOutput",
    "Sparsity",
    "TrainingLoss",
    "architectures",
    "squared_error",
]
