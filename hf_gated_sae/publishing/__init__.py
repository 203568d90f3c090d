"""Publishing SAEs on the Hub: facts, model card, conversion, and one commit per SAE."""

from .card import model_card
from .conversion import Conversion, convert
from .facts import CardFacts, LatentLabel, read_facts
from .mirror import Mirror
from .push import push_to_hub
from .save_published import save

__all__ = [
    "CardFacts",
    "Conversion",
    "LatentLabel",
    "Mirror",
    "convert",
    "model_card",
    "push_to_hub",
    "read_facts",
    "save",
]
