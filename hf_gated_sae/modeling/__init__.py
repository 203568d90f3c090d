"""SAEs as ordinary `transformers` models: configuration, base class, outputs."""

from .config import SAEConfig
from .model import SAEModel, architectures
from .output import SAEOutput, TrainingLoss

__all__ = ["SAEConfig", "SAEModel", "SAEOutput", "TrainingLoss", "architectures"]
