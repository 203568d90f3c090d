"""`capture`: read activations and latents in one forward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import AttachError, InputError
from ..interventions.base import require_fit, site_of
from ..modeling import SAEModel
from ..sites import Site
from ..sites.slots import Place
from .attach import require_model
from .dispatch import enter, exact_dtype, leave, prove
from .report import Record


class _Reached(Exception):
    """Ends the forward once everything wanted was seen."""


class _Capture:
    """A session that edits nothing and keeps what it sees."""

    def __init__(self, places: set[Place], *, stop: bool, grad: bool) -> None:
        self.wanted = places
        self.stop = stop
        self.grad = grad
        self.seen: dict[Place, Tensor] = {}

    def records(self, place: Place) -> list[Record]:
        return []

    def on_device(self, device: torch.device) -> dict[int, Any]:
        return {}

    def observe(self, place: Place, value: Tensor) -> None:
        if place in self.wanted:
            # The model may go on to write into the tensor; with gradients, autograd would notice.
            self.seen[place] = value if self.grad else value.detach().clone()
            if self.stop and len(self.seen) == len(self.wanted):
                raise _Reached


def capture(
    model: Any,
    what: Sequence[Site | str | SAEModel] | Site | str | SAEModel,
    *,
    grad: bool = False,
    **inputs: Any,
) -> dict[Any, Tensor]:
    """Run the model as far as needed and return activations and latents.

    Where interventions are attached, the activation is the edited one that the model goes on with.

    Args:
        model: any Hugging Face causal LM.
        what: sites and SAEs, or a single one.
        grad: keep the autograd graph, and run the model to its end.
        **inputs: the model's inputs, such as ``input_ids`` and ``attention_mask``.

    Returns:
        What was asked for: ``{site: activations [B, S, d], sae: latents [B, S, d_sae]}``.

    Raises:
        InputError: if nothing is asked for.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE is not as wide as its site.
        AttachError: if the forward did not reach a site, or the model is compiled.
    """
    require_model("capture()", model)
    keys: list[Any] = [what] if isinstance(what, (str, Site, SAEModel)) else list(what)
    if not keys:
        raise InputError("capture() was asked for nothing; name at least one site or SAE.")
    sites = {
        key: str(site_of(key) if isinstance(key, SAEModel) else Site.parse(key)) for key in keys if _hashable(key)
    }
    slots = prove(model, sites.values())  # before anything is attached
    for key, site in sites.items():
        if isinstance(key, SAEModel):
            require_fit(key, site, slots[site].width, writes=False)
    # Offloaded weights are put back by hooks that run when a module returns: let every module return.
    offloaded = {"cpu", "disk"} & {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    session = _Capture({slot.place for slot in slots.values()}, stop=not grad and not offloaded, grad=grad)
    held = list({slot.place: slot for slot in slots.values()}.values())
    with nullcontext() if grad else torch.no_grad():
        enter(model, session, held)
        try:
            model(**{"use_cache": False, **inputs})
        except _Reached:
            pass
        finally:
            leave(model, session, held)
        missed = sorted(site for site, slot in slots.items() if slot.place not in session.seen)
        if missed:
            raise AttachError(f"The forward ended without reaching {', '.join(missed)}; nothing was captured there.")
        return {key: _read(key, session.seen[slots[site].place]) for key, site in sites.items()}


def _hashable(key: Any) -> bool:
    if not isinstance(key, Hashable):
        raise InputError(f"capture() was asked for {type(key).__name__}; expected sites or SAEs.")
    return True


def _read(key: Any, activation: Tensor) -> Tensor:
    """Return the activation, or an SAE's latents of it."""
    if not isinstance(key, SAEModel):
        return activation
    with exact_dtype(key.W_dec.device):
        return key.encode(activation.to(device=key.W_dec.device, dtype=key.dtype))
