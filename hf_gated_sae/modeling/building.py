"""Build an SAE around tensors, strictly: transformers only logs a warning for what is missing, extra or misshaped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError, did_you_mean

if TYPE_CHECKING:
    from .config import SAEConfig
    from .model import SAEModel

STATISTICS = ("max_activation", "mean_activation")
"""Tensors that only our own layout has: how strongly each latent fires, if that was recorded."""


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make ordinary tensors even in ``torch.inference_mode()``, whose own can be neither trained nor changed."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield


def unrecorded(rows: int) -> dict[str, Tensor]:
    """Return zeros for the statistics of `rows` latents, ``[rows]`` each: nothing was recorded."""
    return {name: torch.zeros(rows) for name in STATISTICS}


def require_complete(where: str, info: Mapping[str, Any], expected: list[str]) -> None:
    """Raise unless every tensor was found, none was left over and all shapes fit.

    Args:
        where: the checkpoint's name for messages.
        info: transformers' loading info.
        expected: names of the tensors that the architecture has.

    Raises:
        CheckpointError: naming every tensor at fault.
    """
    faults = []
    if missing := sorted(info["missing_keys"]):
        faults.append(f"lacks {', '.join(missing)}")
    if unexpected := sorted(info["unexpected_keys"]):
        faults.append(
            f"has {', '.join(unexpected)}, which this architecture does not{did_you_mean(unexpected[0], expected)}"
        )
    for name, given, wanted in sorted(info["mismatched_keys"]):
        faults.append(f"holds {name} with shape {list(given)} where the configuration says {list(wanted)}")
    if faults:
        raise CheckpointError(
            f"The checkpoint {where} {'; '.join(faults)}. Expected exactly {', '.join(sorted(expected))}: "
            "fetch or convert it again, or correct its config.json."
        )


def largest(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor with the most values; its dtype is the SAE's, as small tensors may have a wider one."""
    return max(tensors.values(), key=lambda tensor: tensor.numel())


def chosen_dtype(given: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    """Return the dtype to load in: the one that `from_pretrained` was given as ``dtype`` or ``torch_dtype``, if any.

    Raises:
        InputError: if it is not a floating-point dtype.
    """
    wanted = next((dtype for dtype in given.values() if dtype not in (None, "auto")), stored)
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is {wanted!r}; expected a floating-point dtype of torch, such as torch.bfloat16.")
    return found


def assembled(
    model_class: type[SAEModel], where: str, config: SAEConfig, state_dict: Mapping[str, Tensor], **dtypes: Any
) -> tuple[SAEModel, dict[str, Any]]:
    """Build an SAE around the tensors, cast if another dtype is given.

    Args:
        model_class: the architecture's class.
        where: the checkpoint's name for messages.
        config: its configuration, which stays unchanged.
        state_dict: its tensors.
        **dtypes: ``dtype`` or ``torch_dtype``, as `from_pretrained` was given them.

    Returns:
        The SAE, and loading info as transformers gives it.

    Raises:
        CheckpointError: if the tensors are not those of the architecture.
        InputError: if the dtype is not a floating-point dtype.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    shared = set(expected) & set(state_dict)
    info = {
        "missing_keys": set(expected) - shared,
        "unexpected_keys": set(state_dict) - shared,
        "mismatched_keys": {
            (name, tuple(state_dict[name].shape), tuple(expected[name].shape))
            for name in shared
            if state_dict[name].shape != expected[name].shape
        },
    }
    require_complete(where, info, list(expected))
    config.dtype = chosen_dtype(dtypes, config.dtype or largest(state_dict).dtype)
    exact = model_class._keep_in_fp32_modules_strict
    tensors = {
        name: _ordinary(tensor).to(torch.float32 if name in exact else config.dtype)
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.eval(), info


def _ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def require_finite(where: str, model: SAEModel) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        # A sum in its own dtype is one pass without a temporary; only a suspicious one, which may merely have
        # overflowed, is looked at element by element.
        if tensor.is_meta or torch.isfinite(tensor.sum()):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"The checkpoint {where} holds {bad} NaN or infinite values in {name}; expected finite weights: "
                "fetch it again, or publish a run that did not diverge."
            )
