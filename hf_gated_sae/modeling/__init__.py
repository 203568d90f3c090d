"""SAEs as ordinary `transformers` models: configuration, base class, outputs."""

from .config import SAEConfig
from .model import SAEModel, architectures
from .output import SAEOutput, TrainingLoss
from .sae_set import SAESet

__all__ = ["SAEConfig", "SAEModel", "SAEOutput", "SAESet", "TrainingLoss", "architectures"]
