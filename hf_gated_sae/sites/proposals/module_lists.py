"""Propose module lists as blocks: those as long as the configured number of layers, else any."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..probe import configured_layers
from . import PROPOSALS, Proposal


def _lists(root: nn.Module) -> list[list[str]]:
    """Return the members' paths of every module list, outermost lists first, then longest."""
    found = [
        [f"{path}.{name}" if path else name for name in module._modules]
        for path, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return sorted(found, key=lambda paths: (paths[0].count("."), -len(paths)))


def as_long_as_configured(root: nn.Module) -> Iterator[list[str]]:
    """Yield the lists whose length is the configured number of layers."""
    layers = configured_layers(root)
    yield from (paths for paths in _lists(root) if len(paths) == layers)


def any_list(root: nn.Module) -> Iterator[list[str]]:
    """Yield every module list."""
    yield from _lists(root)


PROPOSALS.register("list of configured length", Proposal("list of configured length", 40, as_long_as_configured))
PROPOSALS.register("any module list", Proposal("any module list", 50, any_list))
