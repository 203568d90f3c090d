"""`attach`: the only thing that touches the model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError
from ..interventions import Edit, Intervention, Replacement
from ..modeling import SAEModel
from ..sites import Slot
from ..sites.probe import unwrap
from ..sites.slots import Place
from .dispatch import enter, leave, prove
from .report import AttachReport, Record
from .tokens import TokenTracker


class Attachment:
    """Interventions that act on a model between `enable` and `disable`, or inside a ``with`` block.

    Args:
        model: the causal LM; only a weak reference is kept.
        interventions: what to do.
        slots: the proven place of each intervention's site, by name.
    """

    def __init__(self, model: nn.Module, interventions: tuple[Intervention, ...], slots: Mapping[str, Slot]) -> None:
        self.interventions = interventions
        self._model = weakref.ref(unwrap(model)[0])
        self._records = [Record(intervention) for intervention in interventions]
        self._slots = {slot.place: slot for slot in slots.values()}
        self._at: dict[Place, list[Record]] = {place: [] for place in self._slots}
        for record in self._records:
            self._at[slots[str(record.intervention.place)].place].append(record)
        self._saes: dict[torch.device, dict[int, SAEModel]] = {}
        self._tracker: TokenTracker | None = None
        self._before: tuple[int, list[int]] = (0, [])

    # ------------------------------------------------------------------ for users

    def enable(self) -> Attachment:
        """Attach; every forward and generate of the model is now edited.

        Raises:
            AttachError: if it is attached already, or the model is gone.
            InputError: if something else that is attached replaces the same site.
        """
        if self.enabled:
            raise AttachError(
                "These interventions are attached already; disable() them first, or attach() them again."
            )
        model = self._model()
        if model is None:
            raise AttachError("The model that was given to attach() no longer exists; attach() to another one.")
        self._tracker = enter(model, self, self._slots.values())
        self._before = (self._tracker.completed, [record.calls for record in self._records])
        return self

    def disable(self) -> None:
        """Detach; nothing stays behind. Does nothing if not attached."""
        model, self._tracker = self._model() if self.enabled else None, None
        if model is not None:
            leave(model, self, self._slots.values())
        self._saes.clear()

    @property
    def enabled(self) -> bool:
        """Whether the interventions act on the model now."""
        return self._tracker is not None

    def report(self) -> AttachReport:
        """Return which sites were reached, and which tokens of which rows were edited, since `attach`."""
        return AttachReport([record.report() for record in self._records])

    def __enter__(self) -> Attachment:
        """Attach."""
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach, whatever happened.

        Raises:
            AttachError: if the model ran but a site was never reached, so that an intervention had no effect.
        """
        tracker, (completed, calls) = self._tracker, self._before
        self.disable()
        idle = [r.intervention.place for r, before in zip(self._records, calls, strict=True) if r.calls == before]
        if kind is None and idle and tracker is not None and tracker.completed > completed:
            raise AttachError(
                f"The model ran, but never reached {', '.join(sorted({str(place) for place in idle}))}: what was "
                "attached there had no effect. Compiled and fused forwards skip hooks: run the model uncompiled, or "
                "choose another site."
            )

    # ------------------------------------------------------------------ for the dispatcher

    def records(self, place: Place) -> list[Record]:
        """Return the interventions at a place."""
        return self._at.get(place, [])

    def on_device(self, device: torch.device) -> dict[int, SAEModel]:
        """Return the SAEs on a device, moved there once per attachment."""
        if device not in self._saes:
            saes = {id(i.sae_used): i.sae_used for i in self.interventions if i.sae_used is not None}
            with torch.inference_mode(False):  # the copies serve later calls, which may need gradients
                self._saes[device] = {
                    key: sae if sae.W_dec.device == device else copy.deepcopy(sae).to(device)
                    for key, sae in saes.items()
                }
        return self._saes[device]

    def observe(self, place: Place, value: Tensor) -> None:
        """Ignore the outcome; only captures look at it."""


def attach(model: Any, *interventions: Intervention) -> Attachment:
    """Prepare interventions for a model; they act inside ``with attach(...)``, or between `enable` and `disable`.

    Several interventions on one site all read the clean activation, and what they add is summed. The model's
    parameters, its configuration and other hooks are not touched, and the SAEs do not become part of it. A
    copy, a pickle or a checkpoint of an attached model has nothing attached. With gradient checkpointing, call
    ``backward()`` inside the block: it runs the layers again.

    Args:
        model: any Hugging Face causal LM, as the user calls it.
        interventions: what to do, such as ``Splice(sae)`` or ``Ablate(sae, [123])``.

    Returns:
        A context manager, which also reports what was edited.

    Raises:
        InputError: if nothing, or something that is not an intervention, is given, or two replace the same site.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE, direction or value is not as wide as the site.
        AttachError: if the model is compiled.
    """
    require_model("attach()", model)
    if not interventions:
        raise InputError("attach() was given no interventions; pass at least one, such as Splice(sae).")
    for intervention in interventions:
        if not isinstance(intervention, (Edit, Replacement)):
            raise InputError(
                f"attach() was given {type(intervention).__name__}; expected interventions such as Splice(sae) or "
                "Ablate(sae, [123])."
            )
    slots = prove(model, [str(intervention.place) for intervention in interventions])
    replaced: dict[Place, Intervention] = {}
    for intervention in interventions:
        slot = slots[str(intervention.place)]
        intervention.require_width(slot.width)
        if isinstance(intervention, Replacement):
            other = replaced.setdefault(slot.place, intervention)
            if other is not intervention:
                raise InputError(
                    f"Both {type(other).__name__} and {type(intervention).__name__} replace {intervention.place}; "
                    "attach only one of them."
                )
    return Attachment(model, interventions, slots)


def require_model(caller: str, model: Any) -> None:
    """Raise unless `model` can be hooked.

    Raises:
        InputError: if it is no module.
        AttachError: if it is compiled.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{caller} was given {type(model).__name__} as the model; expected a transformers model.")
    if any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in model.modules()):
        raise AttachError(
            f"{caller} was given a compiled model, and compiled code skips hooks that come later: give the model that "
            "went into torch.compile (model._orig_mod), and call that one."
        )
