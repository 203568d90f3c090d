"""One file per checkpoint layout.

To add one, copy `native.py`: a subclass of `CheckpointFormat` with a ``name`` registers itself. Nothing else needs to
be edited. Loading never guesses: exactly one format must claim a folder.
"""

from .base import CheckpointFormat, Example, formats

__all__ = ["CheckpointFormat", "Example", "formats"]
