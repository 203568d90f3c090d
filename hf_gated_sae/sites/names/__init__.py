"""Read other libraries' names of activations as sites.

One file per library: to add one, copy `nnterp.py`, which registers itself. Nothing else needs to be edited.
"""

from .base import Library, Meaning, libraries
from .read_name import explain, read

__all__ = ["Library", "Meaning", "explain", "libraries", "read"]
