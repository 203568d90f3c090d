"""`AutoConfig` and `AutoModel` know our SAEs as soon as the package is imported, at no import cost.

The classes of the SAEs need `transformers.modeling_utils`, which takes longer to import than torch itself. What is
registered here is one light stand-in per architecture file; asked for a configuration, it imports the architectures,
whose real classes take its place.
"""

from __future__ import annotations

import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

ARCHITECTURES = "hf_gated_sae.architectures"


def model_type_of(architecture: str) -> str:
    """Return the ``model_type`` that `config.json` carries for an architecture.

    >>> model_type_of("gated")
    'gated_sae'
    """
    return f"{architecture}_sae"


def _real_config_class(model_type: str) -> type[PreTrainedConfig]:
    from .architectures import architectures  # the import that the stand-in exists to postpone

    model = architectures[model_type.removesuffix("_sae")]
    config_class: type[PreTrainedConfig] = model.config_class
    return config_class


class _StandIn(PreTrainedConfig):
    """Becomes the real configuration when one is built or read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the real configuration instead."""
        return _real_config_class(cls.model_type)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read the real configuration instead."""
        return _real_config_class(cls.model_type).from_dict(config_dict, **kwargs)


def register_stand_ins() -> None:
    """Register one stand-in configuration per architecture file and entry point."""
    files = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "architectures")])]
    for architecture in [*files, *(entry.name for entry in entry_points(group=ARCHITECTURES))]:
        model_type = model_type_of(architecture)
        AutoConfig.register(model_type, type("StandIn", (_StandIn,), {"model_type": model_type}), exist_ok=True)
