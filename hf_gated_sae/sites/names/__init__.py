"""Read other libraries' names of activations as sites.

One file per library: to add one, copy `nnterp.py`, which registers itself. Nothing else needs to be edited.
"""

from ._meanings import explain
from .base import Library, Meaning, libraries

__all__ = ["Library", "Meaning", "explain", "libraries"]
