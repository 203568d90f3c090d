"""Publish an SAE so that others can find, load and trust it: facts, card, one commit."""

from .card import model_card
from .convert import Conversion, convert
from .facts import CardFacts, LatentLabel, read_facts
from .mirror import Mirror
from .push import push_to_hub
from .saving import save

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
