"""Sparse autoencoders as ordinary Hugging Face models, and a plug-in that hooks them into any causal LM.

Names are imported on first use, so that importing the package costs next to nothing beside torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from .auto import register_stand_ins
from .exports import exported

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(exported())
    if name in exported():
        return getattr(importlib.import_module(f".{exported()[name]}", __name__), name)
    if name[:1].isupper():  # perhaps of a plug-in of another package
        from .architectures import architectures
        from .interventions import interventions

        models = [candidate for model in architectures.values() for candidate in (model, model.config_class)]
        for candidate in [*models, *interventions.values()]:
            if candidate.__name__ == name:
                return candidate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *exported()])


register_stand_ins()
