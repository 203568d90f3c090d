"""Strict loading: transformers only logs a warning for tensors that are missing, extra or of the wrong shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError, InputError, did_you_mean
from ..registry import LateBound

if TYPE_CHECKING:
    from .config import SAEConfig
    from .model import SAEModel


@dataclass(frozen=True)
class Checkpoint:
    """One SAE, found and identified but not loaded.

    Attributes:
        model_class: the architecture's class.
        config: its complete configuration; None where `SAEModel.from_pretrained` was given one.
        tensors: dtype (as safetensors names it) and shape of every stored tensor, where that is known without loading.
        repo: repository id or folder.
        subfolder: folder inside it, empty for the root.
        revision: commit that `repo` was pinned to; None for a local folder.
        folder: where ``config.json`` and the weights lie on this machine; None if `arguments` hold them.
        arguments: what `transformers.PreTrainedModel.from_pretrained` has to be called with to load it.
    """

    model_class: type[SAEModel]
    repo: str
    subfolder: str = ""
    revision: str | None = None
    folder: Path | None = None
    config: SAEConfig | None = None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name to use in messages."""
        place = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{place}@{self.revision[:12]}" if self.revision else place


# Say where a checkpoint is: used up once its files are on this machine.
PLACE_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")

open_checkpoint = LateBound("hf_gated_sae.hub.opening", "open_checkpoint")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report: what they would say is raised instead."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def effective_config(
    checkpoint: Checkpoint, config: SAEConfig | None, arguments: Mapping[str, Any]
) -> tuple[SAEConfig, dict[str, Any]]:
    """Return the configuration to load with, and what transformers is to be told.

    Args:
        checkpoint: what is loaded.
        config: the configuration that the user gave, if any.
        arguments: what else `from_pretrained` was given, values for keys of the configuration among it.

    Raises:
        InputError: if the given configuration is of another architecture, or a given value cannot be used.
    """
    config_class = checkpoint.model_class.config_class
    settings = {name: value for name, value in arguments.items() if name not in PLACE_ARGUMENTS}
    given = {name: settings.pop(name) for name in config_class.own_fields() if name in settings}
    chosen = checkpoint.config if config is None else config
    if not isinstance(chosen, config_class):
        raise InputError(
            f"config= is a {type(chosen).__name__}, but {checkpoint} is a {checkpoint.model_class.__name__}: expected "
            f"a {config_class.__name__}."
        )
    return (config_class.from_dict({**chosen.to_dict(), **given}) if given else chosen), settings


@contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers and safetensors raise about arguments and files into a sentence of ours."""
    try:
        yield
    except TypeError as error:
        unexpected = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unexpected is None:
            raise
        fields = list(checkpoint.model_class.config_class.own_fields())
        known = [*PLACE_ARGUMENTS, *fields, "subfolder", "config", "dtype", "device_map", "variant"]
        raise InputError(
            f"from_pretrained has no argument {unexpected[1]!r}.{did_you_mean(unexpected[1], known)} It takes those "
            f"of transformers, and the configuration's keys {', '.join(fields)}."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {checkpoint} cannot be read ({error}): expected complete safetensors files. Fetch them "
            "again."
        ) from error


def require_complete(where: str, info: Mapping[str, Any], expected: list[str]) -> None:
    """Raise unless every tensor was there, none was left over and all shapes fit.

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


def require_headers(checkpoint: Checkpoint, config: SAEConfig) -> None:
    """Raise unless the stored tensors are those of the architecture; before anything of their size is allocated.

    Raises:
        CheckpointError: naming every tensor at fault.
    """
    if not checkpoint.tensors:
        return
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in checkpoint.model_class(config).state_dict().items()}
    stored = checkpoint.tensors
    faults = {
        "missing_keys": set(expected) - set(stored),
        "unexpected_keys": set(stored) - set(expected),
        "mismatched_keys": [
            (name, stored[name][1], expected[name])
            for name in set(stored) & set(expected)
            if stored[name][1] != expected[name]
        ],
    }
    require_complete(str(checkpoint), faults, list(expected))
    for name, (dtype, _) in stored.items():
        if not dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"The checkpoint {checkpoint} holds {name} as {dtype}; expected floating-point numbers: fetch or "
                "convert it again."
            )


def require_finite(where: str, model: SAEModel) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        # A sum is one pass without a temporary; only a suspicious one is looked at element by element.
        if tensor.is_meta or torch.isfinite(tensor.sum(dtype=torch.float32)):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"The checkpoint {where} holds {bad} NaN or infinite values in {name}; expected finite weights: "
                "fetch it again, or publish a run that did not diverge."
            )
