"""A private name of Python's own pickle, the same since Python 3.0.

Torch files are read without running any code in them. The public `pickle.Unpickler` is written in C and runs every
opcode; the one in Python looks opcodes up in a table, which a subclass can restrict to a few.
"""

from pickle import _Unpickler as Unpickler

__all__ = ["Unpickler"]
