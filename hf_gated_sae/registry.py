"""Registries of plug-ins by name, filled from the modules of one package and the entry points of other packages.

A plug-in is one file: importing it registers it. The package is given by its name and imported on first use, so that a
lower layer can look up plug-ins of a higher one without importing it.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import InputError, unknown_name

Plugin = TypeVar("Plugin")


class Registry(Mapping[str, Plugin], Generic[Plugin]):
    """A read-only mapping of names to plug-ins, which imports its package on first use.

    Args:
        kind: the kind of plug-in, for error messages, such as ``"architecture"``.
        package: dotted name of the package whose modules register themselves; also the entry-point group
            (``hf_gated_sae.architectures``) under which other distributions name modules to import.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Plugin] = {}
        self._lock = threading.RLock()
        self._loading = False
        self._complete = False

    def register(self, name: str, plugin: Plugin) -> None:
        """Add one plug-in.

        Raises:
            InputError: if the name is taken by another plug-in.
        """
        taken = self._entries.get(name)
        if taken is not None and getattr(taken, "__qualname__", taken) != getattr(plugin, "__qualname__", plugin):
            raise InputError(
                f"The {self.kind} name {name!r} is already taken by {taken!r}; give {plugin!r} another name."
            )
        self._entries[name] = plugin

    def _load(self) -> dict[str, Plugin]:
        if self._complete:
            return self._entries
        with self._lock:  # other threads wait for the whole registry
            if not self._loading and not self._complete:
                self._loading = True  # the modules imported below may use the registry themselves
                try:
                    package = importlib.import_module(self.package)
                    for module in pkgutil.iter_modules(package.__path__):
                        if not module.name.startswith("_"):  # a helper
                            importlib.import_module(f"{self.package}.{module.name}")
                    for entry in entry_points(group=self.package):
                        entry.load()
                    self._complete = (
                        True  # after an error the next call tries again, as a partial registry would report "unknown"
                    )
                finally:
                    self._loading = False
        return self._entries

    def __getitem__(self, name: str) -> Plugin:
        entries = self._load()
        if name not in entries:
            raise unknown_name(self.kind, name, entries)
        return entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())

    def __contains__(self, name: object) -> bool:
        return name in self._load()


class LateBound:
    """A function of a higher layer that a lower one offers; its module is imported on the first call.

    Only for methods that users expect on the model, or on a set of models, but that are implemented in higher layers:
    ``from_pretrained`` (formats, hub) and ``push_to_hub`` (publishing).

    Args:
        module: dotted name of the module that defines the function.
        name: the function.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(importlib.import_module(self.module), self.name)(*args, **kwargs)
