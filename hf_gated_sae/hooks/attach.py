"""`attach`: the only thing that touches the model."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError, ShapeError
from ..interventions import Intervention, Replacement
from ..modeling import SAEModel
from .dispatch import dispatcher_of, require_sites
from .report import AttachReport, Record


class Attachment:
    """Interventions that act on a model between `enable` and `disable`, or inside a ``with`` block.

    Args:
        model: the causal LM.
        interventions: what to do.
    """

    def __init__(self, model: nn.Module, interventions: tuple[Intervention, ...]) -> None:
        self.model = model
        self.interventions = interventions
        self._records = [Record(intervention) for intervention in interventions]
        self._by_site: dict[str, list[Record]] = {}
        for record in self._records:
            self._by_site.setdefault(str(record.intervention.place), []).append(record)
        self._placed: dict[torch.device, dict[int, SAEModel]] = {}
        self._enabled = False

    # ------------------------------------------------------------------ for users

    def enable(self) -> Attachment:
        """Attach; every forward and generate of the model is now edited.

        Raises:
            AttachError: if it is attached already.
        """
        if self._enabled:
            raise AttachError(
                "These interventions are attached already; disable() them first, or attach() them again."
            )
        dispatcher_of(self.model).enter(self.model, self, list(self._by_site))
        self._enabled = True
        return self

    def disable(self) -> None:
        """Detach; nothing stays behind. Does nothing if not attached."""
        if self._enabled:
            self._enabled = False
            dispatcher_of(self.model).leave(self.model, self, list(self._by_site))
            self._placed.clear()

    @property
    def enabled(self) -> bool:
        """Whether the interventions act on the model now."""
        return self._enabled

    def report(self) -> AttachReport:
        """Return which sites were reached, and which tokens of which rows were edited."""
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
        self.disable()
        reached = {record.intervention.place for record in self._records if record.calls}
        missed = {record.intervention.place for record in self._records} - reached
        if kind is None and reached and missed:
            raise AttachError(
                f"The model ran, but never reached {', '.join(map(str, sorted(missed, key=str)))}: what was attached there "
                "had no effect. A compiled or fused forward skips hooks; attach before compiling, or choose another site."
            )

    # ------------------------------------------------------------------ for the dispatcher

    def records(self, site: str) -> list[Record]:
        """Return the interventions at a site."""
        return self._by_site.get(site, [])

    def place(self, device: torch.device) -> dict[int, SAEModel]:
        """Return the SAEs on a device, moved there once per attachment."""
        if device not in self._placed:
            saes = {id(i.sae_used): i.sae_used for i in self.interventions if i.sae_used is not None}
            self._placed[device] = {
                key: sae if sae.W_dec.device == device else copy.deepcopy(sae).to(device) for key, sae in saes.items()
            }
        return self._placed[device]

    def observe(self, site: str, value: Tensor) -> None:
        """Ignore the outcome; only captures look at it."""


def attach(model: Any, *interventions: Intervention) -> Attachment:
    """Prepare interventions for a model; they act inside ``with attach(...)``, or between `enable` and `disable`.

    Several interventions on one site all read the clean activation, and what they add is summed. The model's parameters,
    its configuration and other hooks are not touched, and the SAEs do not become part of it.

    Args:
        model: any Hugging Face causal LM, as the user calls it.
        interventions: what to do, such as ``Splice(sae)`` or ``Ablate(sae, [123])``.

    Returns:
        A context manager, which also reports what was edited.

    Raises:
        InputError: if nothing, or something that is not an intervention, is given, or two replace the same site.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE's width is not the site's.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"attach() was given {type(model).__name__} as the model; expected a transformers model.")
    if not interventions:
        raise InputError("attach() was given no interventions; pass at least one, such as Splice(sae).")
    replaced: dict[str, Intervention] = {}
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise InputError(
                f"attach() was given {type(intervention).__name__}; expected interventions such as Splice(sae) or "
                "Ablate(sae, [123])."
            )
    widths = require_sites(model, [str(intervention.place) for intervention in interventions])
    for intervention in interventions:
        place = intervention.place
        width = widths[str(place)]
        sae = intervention.sae_used
        if sae is not None and (sae.config.d_in, sae.d_out) != (width, width):
            raise ShapeError(
                f"The SAE reads d_in = {sae.config.d_in} and writes d_out = {sae.d_out}, but {place} of this "
                f"{type(model).__name__} is {width} wide: this SAE (base model {sae.config.base_model!r}) does not belong there."
            )
        if isinstance(intervention, Replacement):
            if str(place) in replaced:
                raise InputError(
                    f"Both {type(replaced[str(place)]).__name__} and {type(intervention).__name__} replace {place}; "
                    "attach only one of them."
                )
            replaced[str(place)] = intervention
    return Attachment(model, interventions)
