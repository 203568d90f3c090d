"""The base class of everything that is attached to a model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..interventions import Intervention
from ..modeling import SAEModel
from ..sites import Site
from ..sites.slots import TensorPath
from ..sites.transforms import Transform

if TYPE_CHECKING:
    from .attach_report import Record


class Session:
    """What is attached to one model: interventions to apply, and an observer of the edited activations.

    Args:
        all_threads: whether it acts on calls of the model from every thread and task, or only from that of `begin`.
    """

    interventions: tuple[Intervention, ...] = ()
    """The interventions to apply; none if it only observes."""

    def __init__(self, *, all_threads: bool = False) -> None:
        self.all_threads = all_threads
        self.records: Mapping[TensorPath, Sequence[Record]] = {}
        """Its interventions by the tensor that they write."""
        self.reads: Mapping[TensorPath, Sequence[tuple[Site, tuple[Transform, ...]]]] = {}
        """By tensor, the sites and transforms under which interventions at other sites read it."""
        self.active = False
        self.completed = 0
        """Number of forwards that have ended without an error while it was active."""
        self.generations = 0
        """Number of calls of `generate` that ran the model on generated tokens while it acted."""
        self.failure: Exception | None = None
        """An error raised while it acted in another thread than its own, where perhaps only a log shows it."""
        self._thread: int | None = None
        self.passed_by = False
        """Whether the model was called from a thread or task in which it does not act."""

    def begin(self) -> None:
        """Record that it begins, from this thread."""
        self.active, self.failure, self._thread = True, None, threading.get_ident()

    def fail(self, error: Exception) -> None:
        """Record an error raised while it acted."""
        if threading.get_ident() != self._thread:
            self.failure = self.failure or error

    def placed(self, sae: SAEModel, device: torch.device) -> SAEModel:
        """Return an SAE on a device."""
        return sae

    observes = False
    """Whether `observe` is to be called."""

    def observe(self, place: TensorPath, value: Tensor) -> Tensor | None:
        """Observe the activation with which the model continues; return a replacement, or None to keep it."""
