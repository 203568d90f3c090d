"""Register the SAEs with transformers' `AutoConfig` and `AutoModel` on import, without importing transformers.

The SAE classes need `transformers.modeling_utils`, which takes longer to import than torch. So one light stand-in per
architecture file is registered. When a configuration is built or read, it imports the architectures, whose real
classes replace it. If transformers has not been imported yet, the registration waits until it is, so that
``hf-gated-sae --help`` needs neither it nor torch.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = "hf_gated_sae.architectures"
AUTO = "transformers.models.auto.configuration_auto"
"""The module that defines `AutoConfig`; `AutoModel` imports it, too."""


def model_type_of(architecture: str) -> str:
    """Return the ``model_type`` in the `config.json` of an architecture.

    >>> model_type_of("gated")
    'gated_sae'
    """
    return f"{architecture}_sae"


def register_stand_ins() -> None:
    """Register a stand-in configuration per architecture file and entry point, now or after transformers' import."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO].AutoConfig)
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(auto_config: Any) -> None:
    """Register the stand-ins with transformers' `AutoConfig`."""
    from importlib.metadata import (
        entry_points,  # imported here, as it takes a tenth of the time of `hf-gated-sae --help`
    )

    from transformers.configuration_utils import PreTrainedConfig

    class StandIn(PreTrainedConfig):
        """A configuration class that builds and reads the real one."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Build the real configuration instead."""
            return _real_config_class(cls.model_type)(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Read the real configuration instead."""
            return _real_config_class(cls.model_type).from_dict(config_dict, **kwargs)

    files = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "architectures")])]
    for architecture in [*files, *(entry.name for entry in entry_points(group=ARCHITECTURES))]:
        model_type = model_type_of(architecture)
        auto_config.register(model_type, type("StandIn", (StandIn,), {"model_type": model_type}), exist_ok=True)


def _real_config_class(model_type: str) -> type[PreTrainedConfig]:
    from .architectures import architectures  # the import that the stand-in exists to postpone

    model = architectures[model_type.removesuffix("_sae")]
    config_class: type[PreTrainedConfig] = model.config_class
    return config_class


class _AfterImport(MetaPathFinder):
    """Finder of the module of `AutoConfig`; registers the stand-ins after the module has been executed."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of that module, None for every other one."""
        if name != AUTO or self._searching:
            return None
        self._searching = True  # `importlib` calls all finders, this one included
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    """Loader that wraps another one and registers the stand-ins after it."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register the stand-ins."""
        self._loader.exec_module(module)
        assert module.__spec__ is not None  # a module that is being imported has a spec
        module.__spec__.loader = module.__loader__ = self._loader
        _register(module.AutoConfig)
        sys.meta_path.remove(self._finder)  # only after success: an import that failed may be tried again
