"""Checkpoint layouts, one file each, and the search for the one layout that claims a folder.

To add one, copy `native.py`: a subclass of `CheckpointFormat` with a ``name`` registers itself. Nothing else needs to
be edited. Loading never guesses: exactly one format must claim a folder. Files whose names begin with an underscore
are helpers.
"""

from ._claims import claims_of
from ._home_made import described_tensors
from ._opening import locate_sae, natural_order, open_at, open_checkpoint, sae_addresses
from .base import CheckpointFormat, Example, formats

__all__ = [
    "CheckpointFormat",
    "Example",
    "claims_of",
    "described_tensors",
    "formats",
    "locate_sae",
    "natural_order",
    "open_at",
    "open_checkpoint",
    "sae_addresses",
]
