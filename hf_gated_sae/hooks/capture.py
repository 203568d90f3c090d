"""`capture`: read activations and latents in one forward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, InputError
from ..interventions.base import site_of
from ..modeling import SAEModel
from ..sites import Site
from .dispatch import dispatcher_of, require_sites
from .report import Record


class _Reached(Exception):
    """Ends the forward once everything wanted was seen."""


class _Capture:
    """A session that edits nothing and keeps what it sees."""

    def __init__(self, sites: set[str], stop: bool) -> None:
        self.wanted = sites
        self.stop = stop
        self.seen: dict[str, Tensor] = {}

    def records(self, site: str) -> list[Record]:
        return []

    def place(self, device: torch.device) -> dict[int, SAEModel]:
        return {}

    def observe(self, site: str, value: Tensor) -> None:
        if site in self.wanted:
            self.seen[site] = value
            if self.stop and len(self.seen) == len(self.wanted):
                raise _Reached


def capture(
    model: Any, what: Sequence[Site | str | SAEModel] | Site | str | SAEModel, *, grad: bool = False, **inputs: Any
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
        AttachError: if the forward did not reach a site.
    """
    keys: list[Any] = [what] if isinstance(what, (str, Site, SAEModel)) else list(what)
    if not keys:
        raise InputError("capture() was asked for nothing; name at least one site or SAE.")
    sites = {
        key: str(site_of(key) if isinstance(key, SAEModel) else Site.parse(key)) for key in keys if _hashable(key)
    }
    require_sites(model, sites.values())  # before anything is attached
    # Offloaded weights are put back by hooks that run when a module returns: let every module return.
    offloaded = {"cpu", "disk"} & {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    session = _Capture(set(sites.values()), stop=not grad and not offloaded)
    dispatcher = dispatcher_of(model)
    with nullcontext() if grad else torch.no_grad():
        dispatcher.enter(model, session, sorted(session.wanted))
        try:
            _run(model, inputs)
        except _Reached:
            pass
        finally:
            dispatcher.leave(model, session, sorted(session.wanted))
        missed = sorted(session.wanted - set(session.seen))
        if missed:
            raise AttachError(f"The forward ended without reaching {', '.join(missed)}; nothing was captured there.")
        return {key: _read(key, session.seen[site]) for key, site in sites.items()}


def _hashable(key: Any) -> bool:
    if not isinstance(key, Hashable):
        raise InputError(f"capture() was asked for {type(key).__name__}; expected sites or SAEs.")
    return True


def _run(model: nn.Module, inputs: dict[str, Any]) -> None:
    model(**{"use_cache": False, **inputs})


def _read(key: Any, activation: Tensor) -> Tensor:
    """Return the activation, or an SAE's latents of it."""
    if not isinstance(key, SAEModel):
        return activation
    return key.encode(activation.to(device=key.W_dec.device, dtype=key.dtype))
