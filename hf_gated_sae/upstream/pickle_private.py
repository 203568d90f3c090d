"""A private name of Python's own pickle, the same since Python 3.0.

Torch files are read without running what they hold. The public `pickle.Unpickler` is written in C and cannot be kept
from any opcode; the one in Python looks each of them up in a table, of which a subclass keeps a few.
"""

from pickle import _Unpickler as Unpickler

__all__ = ["Unpickler"]
