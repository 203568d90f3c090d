"""Training SAEs: streams of activations, training arguments, and a subclass of transformers' `Trainer`.

A new remedy for dead latents is one file in `remedies/`; a new source of activations subclasses `ActivationStream`.
"""

from ..hooks.harvest import harvest
from .activation_unit import change_unit
from .arguments import SAETrainingArguments
from .remedies import DeadLatentRemedy, remedies
from .streams import (
    ActivationStream,
    ModelActivations,
    ShardActivations,
    TensorActivations,
    Text,
    TextFiles,
    TextTokens,
    TokenStream,
    collect,
    open_text,
)
from .trainer import SAETrainer

__all__ = [
    "ActivationStream",
    "DeadLatentRemedy",
    "ModelActivations",
    "SAETrainer",
    "SAETrainingArguments",
    "ShardActivations",
    "TensorActivations",
    "Text",
    "TextFiles",
    "TextTokens",
    "TokenStream",
    "change_unit",
    "collect",
    "harvest",
    "open_text",
    "remedies",
]
