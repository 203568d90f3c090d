"""One file per architecture: its configuration, parameters, encoder and training objective.

To add one, copy `standard.py`, rename its two classes and its ``model_type``, and write its equations. The file's name
is the architecture's name, and the ``model_type`` is that name followed by ``_sae``. Nothing else in the package needs
to be edited: the registry, `AutoModel`, saving and loading, the interventions and the conformance tests find it. The
tests need its equations a second time, in numpy, in a file of the same name in ``tests/architectures/references``.
"""

from ..modeling import architectures

__all__ = ["architectures"]
