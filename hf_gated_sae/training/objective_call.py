"""Building an objective from its options, and calling it through the wrappers that transformers puts around SAEs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import InputError, unknown_name
from ..modeling import Objective, SAEModel


def build_objective(sae: SAEModel, flags: Mapping[str, Any]) -> Objective:
    """Return the objective of an SAE.

    Args:
        sae: determines the ``objective_class``.
        flags: values of its fields.

    Raises:
        UnknownNameError: for a field that it does not have, with close matches.
        InputError: for a value that the field cannot have.
    """
    kind = type(sae).objective_class
    known = {each.name: each for each in fields(kind)}
    for name, value in flags.items():
        if name not in known:
            raise unknown_name(f"variant of the objective of a {type(sae).__name__}:", name, known)
        if isinstance(known[name].default, bool) and not isinstance(value, bool):
            raise InputError(f"The objective's {name} is {value!r}; expected true or false.")
    return kind(**flags)


def called_through(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Return ``function(*inputs)``, called so that gradients are synchronised between processes.

    Data-parallel wrappers, and modules that `fully_shard` was applied to, only synchronise computations that pass
    through their ``forward``. The inner module's ``forward`` is therefore replaced by the function during the call.

    Args:
        wrapper: the module itself, or a wrapper around it.
        module: the inner module.
        function: computes from the module's parameters; returns tensors, lists and mappings.
        *inputs: its arguments.
    """
    if wrapper is module and not isinstance(module, FSDPModule):
        return function(*inputs)
    own = module.__dict__.get("forward")  # accelerate replaces forward on the instance for mixed precision
    module.forward = function
    try:
        return wrapper(*inputs)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
