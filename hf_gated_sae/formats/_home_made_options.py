"""Configuration keys of a home-made checkpoint: those that the file states, and those that the user must pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..modeling import SAEConfig, SAEModel
from ..storage import StoredTensor
from ._home_made_content import Content

ALSO = {"k": ("top_k", "topk")}
"""Other usual names of a configuration key."""
BIAS = "apply_b_dec_to_input"


def required_counts(model_class: type[SAEModel]) -> list[str]:
    """Return the architecture's required counts, such as `k`."""
    own = model_class.config_class.own_fields()
    return [name for name, kinds in own.items() if name not in SAEConfig.own_fields() and kinds == (int,)]


def options_of(
    model_class: type[SAEModel], given: Mapping[str, Any], content: Content
) -> tuple[dict[str, Any], list[str], set[str]]:
    """Return the arguments of the configuration, except the widths.

    Args:
        model_class: the architecture's class.
        given: the user's options, which have precedence.
        content: the content of the file; its values are used where they are of the right type and agree.

    Returns:
        The options; sentences about options that the user must pass; paths of tensors that are such values.
    """
    fields = model_class.config_class.own_fields()
    wanted = [name for name in fields if name not in SAEConfig.own_fields() or name == BIAS]
    options, faults, used = dict(given), [], set()
    for name in wanted:
        stated = _stated_values(name, content)
        used |= {path for path, _ in stated if path in content.tensors}
        if name in given:
            continue
        fitting = {path: value for path, value in stated if type(value) in fields[name]}
        if len(set(fitting.values())) == 1:
            options[name] = next(iter(fitting.values()))
        elif fitting:
            held = ", ".join(f"{path} = {value}" for path, value in fitting.items())
            faults.append(f"it states {held}: pass {name}= to choose")
        elif name in required_counts(model_class):
            faults.append(f"it does not state {name}: pass {name}=")
    return options, faults, used


def _stated_values(name: str, content: Content) -> list[tuple[str, Any]]:
    """Return the values under a key at any path of the file, with their paths."""
    names = (name, *ALSO.get(name, ()))
    found = [(path, value) for path, value in content.values.items() if path.rpartition(".")[2].lower() in names]
    for path, tensor in content.tensors.items():
        is_count = math.prod(tensor.shape) == 1 and not tensor.dtype.is_floating_point
        if is_count and path.rpartition(".")[2].lower() in names:
            found.append((path, int((tensor.small() if isinstance(tensor, StoredTensor) else tensor).item())))
    return found
