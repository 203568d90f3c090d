"""Strict loading: transformers only logs a warning for tensors that are missing, extra or of the wrong shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError, did_you_mean
from ..registry import LateBound

if TYPE_CHECKING:
    from .model import SAEModel


@dataclass(frozen=True)
class Checkpoint:
    """One SAE, found and identified but not loaded.

    Attributes:
        model_class: the architecture's class.
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
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name to use in messages."""
        place = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{place}@{self.revision[:12]}" if self.revision else place


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
