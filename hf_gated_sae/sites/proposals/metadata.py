"""Propose blocks from transformers' metadata: recorded classes, checkpointed layers, pipeline plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import PROPOSALS, Proposal


def _siblings(root: nn.Module, classes: tuple[type, ...]) -> Iterator[list[str]]:
    """Yield the paths of modules of the given classes, one list per parent."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for path, module in root.named_modules():
        if isinstance(module, classes):
            by_parent[path.rpartition(".")[0]].append(path)
    yield from by_parent.values()


def recorded_classes(root: nn.Module) -> Iterator[list[str]]:
    """Yield the modules whose outputs transformers records as hidden states."""
    for module in root.modules():
        recorded = getattr(module, "_can_record_outputs", None)
        entry = recorded.get("hidden_states") if isinstance(recorded, Mapping) else None
        entries = entry if isinstance(entry, list | tuple) else [entry]
        classes = [getattr(item, "target_class", item) for item in entries]
        known = tuple(item for item in classes if isinstance(item, type))
        if known:
            yield from _siblings(root, known)


def checkpointed_layers(root: nn.Module) -> Iterator[list[str]]:
    """Yield the modules that support gradient checkpointing in transformers."""
    yield from _siblings(root, (GradientCheckpointingLayer,))


def pipeline_plan(root: nn.Module) -> Iterator[list[str]]:
    """Yield the modules that are listed as ``layers`` in the configuration's pipeline plan."""
    for path, module in root.named_modules():
        plan = getattr(getattr(module, "config", None), "base_model_pp_plan", None)
        layers = module._modules.get("layers")
        if isinstance(plan, Mapping) and "layers" in plan and layers is not None:
            prefix = f"{path}.layers" if path else "layers"
            yield [f"{prefix}.{name}" for name in layers._modules]


for _name, _rank, _propose in (
    ("recorded classes", 10, recorded_classes),
    ("checkpointed layers", 20, checkpointed_layers),
    ("pipeline plan", 30, pipeline_plan),
):
    PROPOSALS.register(_name, Proposal(_name, _rank, _propose))
