"""Streams of activations from memory, from shards on disk, or from a causal LM that reads text.

A new source of activations subclasses `ActivationStream`, a new source of text `Text`.
"""

from .base import ANY_SITE, ActivationStream, Cursor
from .dataset import DatasetText, open_text
from .held_back import HeldBack
from .model_activations import ModelActivations, collect
from .packing import TextTokens
from .rows import RowActivations
from .shard_activations import ShardActivations
from .tensor_activations import TensorActivations
from .text import IterableText, Text, TextFiles
from .tokens import GivenTokens, TokenStream

__all__ = [
    "ANY_SITE",
    "ActivationStream",
    "Cursor",
    "DatasetText",
    "GivenTokens",
    "HeldBack",
    "IterableText",
    "ModelActivations",
    "RowActivations",
    "ShardActivations",
    "TensorActivations",
    "Text",
    "TextFiles",
    "TextTokens",
    "TokenStream",
    "collect",
    "open_text",
]
