"""`sae_envoys`: latents as values that an nnsight trace can read and assign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AttachError, InputError, ShapeError
from ...interventions import ModelCall, SiteCall, TokenContext
from ...interventions.base import require_sae, require_written_width, sites_read_elsewhere, sites_written
from ...modeling import SAEModel
from ...sites import Slot
from ...sites.slots import get_tensor, pack_input, put_tensor
from ...sites.transforms import view
from ..apply import add, exact_dtype
from ..attach import Attachment, require_model
from ..dispatch import prove
from .edit import refuse_hooks


class _Latents:
    """Reads and writes the latents of one SAE in the input or output of one module.

    Args:
        sae: the SAE.
        slot: its proven site.
        model: the model in which it was proven.
    """

    def __init__(self, sae: SAEModel, slot: Slot, model: nn.Module) -> None:
        self.sae, self.slot, self.model = sae, slot, model
        self._placed = Attachment(model, (), {}).placed

    def read(self, value: Any) -> Tensor:
        """Return the latents ``[B, S, d_sae]`` of a served value."""
        refuse_hooks(self.model)
        tensor = self._tensor(value)
        with exact_dtype(tensor.device):
            return self._run(tensor).all_latents(self.sae)

    def write(self, latents: Tensor, value: Any) -> Any:
        """Return the served value with ``x + (latents - encode(x)) @ W_dec``; itself if the latents did not change.

        Raises:
            ShapeError: if the latents have the wrong shape.
        """
        tensor = self._tensor(value)
        seen = view(tensor, self.slot.tensor_path.steps)
        with exact_dtype(tensor.device):
            run = self._run(tensor)
            clean = run.all_latents(self.sae)
            try:
                delta = latents.to(clean).expand_as(clean) - clean
            except RuntimeError:
                raise ShapeError(
                    f"Latents {list(clean.shape)} were set to {list(latents.shape)}; expected a shape that broadcasts."
                ) from None
            changed = (delta != 0).flatten(0, -2).any(0).nonzero().flatten().tolist()
            if not changed:
                return value
            written = run.written(self.sae, changed, delta[..., changed])
        new = add(seen.value, [(True, written)], seen.value)
        assert new is not None
        new = (seen.written(new) if self.slot.tensor_path.steps else new).to(tensor.dtype)
        if self.slot.tensor_path.in_place:
            tensor.copy_(new)
            return value
        return self._unpacked(put_tensor(self._packed(value), self.slot.tensor_path.keys, new))

    def _run(self, tensor: Tensor) -> SiteCall:
        x = view(tensor, self.slot.tensor_path.steps).value
        index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        tokens = TokenContext(index, index[:, :1], None, "mixed", x.shape[1])  # positions are not used
        return SiteCall(x, tokens, self._placed, call=ModelCall(tokens))

    def _tensor(self, value: Any) -> Tensor:
        place = self.slot.tensor_path
        found = get_tensor(self._packed(value), place.keys)
        if found is None or found.ndim != place.rank or found.shape[-1] != place.width:
            raise ShapeError(f"{place} has another structure than when {self.slot.site} was proven.")
        return found

    def _packed(self, value: Any) -> Any:
        return pack_input(*value) if self.slot.tensor_path.port == "input" else value

    def _unpacked(self, packed: Any) -> Any:
        return (packed["args"], packed["kwargs"]) if self.slot.tensor_path.port == "input" else packed


def sae_envoys(model: Any, *saes: SAEModel) -> dict[str, type]:
    """Return envoy classes for nnsight's ``envoys=``: the module at each SAE's site gets ``latents``.

    In a trace they can be read and saved, changed in place and assigned. This adds ``(latents' - latents) @ W_dec`` to
    the activation ``x``; reading alone leaves it unchanged, bit for bit. All tokens are edited, special ones included;
    the trace decides which to change. The SAEs do not become part of the model. Such a model cannot be sent to another
    machine; use `edit` for ``remote=True``.

    Args:
        model: the transformers model that will be wrapped.
        *saes: at most one for each module.

    Returns:
        The class for each module path: ``TransformersModel(model, envoys=sae_envoys(model, sae))``.

    Raises:
        InputError: if an SAE names no site, reads other sites than it writes, or has the same module as another.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE is not as wide as its site.
    """
    require_model("sae_envoys()", model)
    if not saes:
        raise InputError("sae_envoys() was given no SAEs; expected at least one.")
    found: dict[str, type] = {}
    for sae in saes:
        require_sae(sae_envoys, sae)
        (site, *others) = map(str, sites_written(sae))
        if others or sites_read_elsewhere(sae):
            raise InputError(
                f"sae_envoys() was given an SAE that reads {sae.config.sites_read} and writes "
                f"{sae.config.sites_written}; expected one of a single site. Use edit() for others."
            )
        slot = prove(model, [site])[site]
        require_written_width(sae, site, slot.width)
        if slot.tensor_path.rank != 3 or slot.tensor_path.shards is not None:
            raise InputError(f"{site} is not [B, S, d] at {slot.tensor_path} in this model: use edit() there.")
        if slot.tensor_path.path in found:
            raise InputError(f"sae_envoys() was given two SAEs for {slot.tensor_path.path!r}; wrap the model twice.")
        found[slot.tensor_path.path] = _envoy_class(_Latents(sae, slot, model))
    return found


def _envoy_class(values: _Latents) -> type:
    """Return an envoy class with `latents`."""
    from nnsight.intervention.envoy import Envoy
    from nnsight.intervention.eproperty import eproperty
    from nnsight.intervention.interleaver import Mediator

    port = values.slot.tensor_path.port

    class Served(eproperty):
        """A value that exists only on this machine."""

        def __reduce__(self) -> tuple[Any, ...]:
            raise AttachError(
                "A model with sae_envoys() cannot be sent to another machine, which does not have the SAE: use edit() "
                "on a model that was wrapped without envoys."
            )

    class SAEEnvoy(Envoy):
        """The envoy of a module at which an SAE reads and writes."""

        @Served(key=port, description=f"latents of the SAE at {values.slot.site}")
        def latents(self, value: Any) -> Tensor:
            """The latents ``[B, S, d_sae]`` of what passes here."""
            return values.read(value)

        @latents.postprocess  # type: ignore[no-redef]  # as properties do
        def latents(self, latents: Any) -> Any:
            return values.write(latents, Mediator.value(f"{self.path}.{port}"))

        @latents.transform  # type: ignore[no-redef]  # likewise
        def latents(self, latents: Any, value: Any) -> Any:
            return values.write(latents, value)

    return SAEEnvoy
