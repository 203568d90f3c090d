"""Loading the causal LM of a run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...errors import InputError, MissingFileError
from .commits import commit_on_hub
from .run_config import ModelSettings

NOWHERE = "none"
"""Value of `hub_id` for a model that is not published."""

_SHAPE = 512, 1024
"""Rows and width of the matrix product with which the speed of dtypes is compared."""


def with_dtype(settings: ModelSettings, device: torch.device) -> tuple[ModelSettings, str]:
    """Return the settings with ``auto`` replaced by a dtype, and why it differs from the checkpoint's dtype.

    On a CPU without bfloat16 or float16 arithmetic, float32 is several times faster. It represents every number of
    those dtypes, so it costs memory only.

    Args:
        settings: of the model.
        device: of the model if the settings name none.
    """
    model_device = torch.device(settings.device) if settings.device is not None else device
    if settings.dtype != "auto" or settings.device_map is not None or settings.quantization is not None:
        return settings, ""
    config = load_config(settings)
    stored = config.get_text_config().dtype or config.dtype
    if model_device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return settings, ""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters() * torch.float32.itemsize
    if size > psutil.virtual_memory().available / 2:
        return settings, ""
    times = {dtype: _seconds(dtype) for dtype in (stored, torch.float32)}
    factor = times[stored] / times[torch.float32]
    name = str(stored).removeprefix("torch.")
    if factor < 1:
        return dataclasses.replace(settings, dtype=name), ""
    return dataclasses.replace(settings, dtype="float32"), f"stored in {name}, which takes {factor:.1f}x as long here"


def _seconds(dtype: torch.dtype) -> float:
    """Return the time of a matrix product on the CPU, in seconds: the shortest of a few runs."""
    rows, width = _SHAPE
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    found = []
    for _ in range(4):
        start = time.perf_counter()
        x @ weight
        found.append(time.perf_counter() - start)
    return min(found)


def load_model(settings: ModelSettings, device: torch.device) -> PreTrainedModel:
    """Return the model in evaluation mode, with all parameters frozen.

    Args:
        settings: of the model.
        device: of the model if the settings name none.

    Raises:
        MissingFileError: if it is a folder that does not exist.
        InputError: if a setting is wrong, or transformers cannot load it.
    """
    _require_folder(settings.name)
    if settings.dtype != "auto" and not isinstance(getattr(torch, settings.dtype, None), torch.dtype):
        raise InputError(f"model.dtype is {settings.dtype!r}; expected auto, float32, bfloat16 or float16.")
    more: dict[str, Any] = {"device_map": settings.device_map} if settings.device_map is not None else {}
    if settings.quantization is not None:
        more["quantization_config"] = settings.quantization
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.name, revision=settings.revision or "main", dtype=settings.dtype, **more
        )
        if settings.device_map is None and settings.quantization is None:
            model = model.to(settings.device or device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises errors of many types for broken files
        raise InputError(f"model.name {settings.name!r} cannot be loaded ({_reason(error)}).") from error
    model.requires_grad_(False)
    return model.eval()


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """Return the model's configuration alone; errors as for `load_model`."""
    _require_folder(settings.name)
    try:
        return AutoConfig.from_pretrained(settings.name, revision=settings.revision or "main")
    except Exception as error:
        raise InputError(f"model.name {settings.name!r} cannot be loaded ({_reason(error)}).") from error


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        InputError: if transformers cannot load it.
    """
    try:
        return AutoTokenizer.from_pretrained(settings.name, revision=settings.revision or "main")
    except Exception as error:
        raise InputError(f"The tokenizer of {settings.name!r} cannot be loaded ({_reason(error)}).") from error


def pinned_model(settings: ModelSettings) -> ModelSettings:
    """Return the settings with the commit of the model's revision; errors as for `commit_on_hub`."""
    _require_folder(settings.name)
    if is_folder(settings.name):
        if settings.hub_id is None:
            raise InputError(
                f"model.name is {settings.name!r}, a folder: give --model.hub_id, the id of this model on the Hub, "
                f"for the SAE's card and configuration; or --model.hub_id {NOWHERE} if there is no such id."
            )
        if settings.revision is not None:
            raise InputError(f"model.revision does not apply to {settings.name!r}, which is a folder: remove it.")
        return settings
    commit = commit_on_hub(settings.name, settings.revision, "model", "model.name")
    return dataclasses.replace(settings, revision=commit)


def is_folder(name: str) -> bool:
    """Whether a model is a local folder, not a repository on the Hub."""
    return Path(name).is_dir()


def _require_folder(name: str) -> None:
    path = Path(name)
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.is_dir():
        raise MissingFileError(f"model.name is {name!r}, and there is no such folder; give one, or the id of a model.")


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
