"""Loading the causal LM of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
from .config import ModelSettings
from .pinning import commit_on_hub


def load_model(settings: ModelSettings, device: torch.device) -> PreTrainedModel:
    """Return the model in evaluation mode; nothing of it learns.

    Args:
        settings: what the run says.
        device: where it goes if the run does not say.

    Raises:
        MissingFileError: if it is a folder that is not there.
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
    except Exception as error:  # whatever is wrong with the files is reported as one thing
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
    """Return the settings with the commit that the model's revision leads to; errors as for `commit_on_hub`."""
    _require_folder(settings.name)
    if is_folder(settings.name):
        if settings.revision is not None:
            raise InputError(f"model.revision means nothing with {settings.name!r}, which is a folder: remove it.")
        return settings
    commit = commit_on_hub(settings.name, settings.revision, "model", "model.name")
    return dataclasses.replace(settings, revision=commit)


def is_folder(name: str) -> bool:
    """Whether a model is one of this machine's folders, not one of the Hub."""
    return Path(name).is_dir()


def _require_folder(name: str) -> None:
    path = Path(name)
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.is_dir():
        raise MissingFileError(f"model.name is {name!r}, and there is no such folder; give one, or the id of a model.")


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
