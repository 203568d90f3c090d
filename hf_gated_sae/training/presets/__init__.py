"""Recipes by name, one YAML file each; a run may override any of their settings.

Another package offers one by an entry point ``name = "package"`` in the group ``hf_gated_sae.training.presets``, where
the package holds ``name.yaml``.

A file describes the recipe (`description`), its origin (`source`) and the units of its loss and lambda (`units`); its
sections `sae`, `data` and `training` are those of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

import yaml

from ...errors import unknown_name

SUFFIX = ".yaml"


@dataclass(frozen=True)
class Preset:
    """A training recipe.

    Attributes:
        description: of the recipe, in a sentence or two.
        source: its publication, and which choices are ours.
        units: of loss and lambda, and how published values are converted.
        sae: settings of a run's section `sae`.
        data: settings of its section `data`.
        training: settings of its section `training`.
        package: the package that its file is in.
    """

    description: str
    source: str
    units: str
    sae: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    package: str = __package__

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings by section, which those of a run override."""
        return {"sae": dict(self.sae), "data": dict(self.data), "training": dict(self.training)}


class Presets(Mapping[str, Preset]):
    """The recipes in this folder, by name."""

    def __getitem__(self, name: str) -> Preset:
        """Return a recipe.

        Raises:
            UnknownNameError: if there is no recipe of that name.
        """
        packages = self._packages()
        if name not in packages:
            raise unknown_name("preset", name, packages)
        text = (files(packages[name]) / f"{name}{SUFFIX}").read_text(encoding="utf-8")
        return Preset(**yaml.safe_load(text), package=packages[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in alphabetical order."""
        return iter(sorted(self._packages()))

    def __len__(self) -> int:
        """Number of recipes."""
        return len(self._packages())

    @staticmethod
    @cache
    def _packages() -> dict[str, str]:
        """Return the package that each recipe lies in; those of other packages are named by entry points."""
        found = {entry.name: entry.value for entry in entry_points(group=__package__)}
        names = (each.name for each in files(__package__).iterdir())
        return found | {name.removesuffix(SUFFIX): __package__ for name in names if name.endswith(SUFFIX)}


presets = Presets()
