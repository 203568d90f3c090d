"""`capture`: read activations and latents in one forward."""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AttachError, InputError, ShapeError, shown
from ..interventions.base import require_read_width, sites_read, sites_written
from ..modeling import SAEModel
from ..sites import Site, Slot
from ..sites.multi_rank import must_finish
from ..sites.probe import unwrap
from ..sites.slots import TensorPath
from ..sites.transforms import view
from .apply import exact_dtype
from .attach import require_model
from .continuation import facts_of
from .dispatch import prove
from .observation import Observation, real_tokens
from .running_call import cache_in
from .token_batches import sequences_in_rows

Wanted = Site | str | SAEModel
"""What can be read: a site, or an SAE's latents of the sites that its configuration names."""


class _Anchor:
    """Puts an SAE's latents into the graph, so that what the model computes after them depends on them.

    ``x`` is replaced by ``x + (decode(latents) - decode(f))``, where ``latents`` is a copy of ``f = encode(x)``: it is
    bitwise equal to `x`, the error term stays, and gradients with respect to `x` do not change.
    """

    def __init__(self, sae: SAEModel, slots: Mapping[str, Slot]) -> None:
        self.sae = sae
        [self.read] = [slots[str(site)].tensor_path for site in sites_read(sae)]
        self.written = [slots[str(site)].tensor_path for site in sites_written(sae)]
        self.source: Tensor | None = None
        self.encoded: Tensor | None = None
        self.copy: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """The latents ``[B, S, d_sae]``, once the site that is read was reached."""
        assert self.copy is not None  # or the observation has raised
        return self.copy

    @staticmethod
    def fits(sae: SAEModel) -> bool:
        """Whether all latents of an SAE are known before it writes, and what each of them writes."""
        config = sae.config
        several = len(config.sites_written) > 1 and not config.is_transcoder
        return sae.per_token and config.kept_latents is None and len(config.sites_read) == 1 and not several

    def at(self, place: TensorPath, x: Tensor) -> Tensor:
        """Return the activation with which the model continues at a site.

        Raises:
            InputError: if the model computes what is written before what is read.
        """
        with exact_dtype(x.device), exact_dtype(self.sae.b_dec.device):
            if self.read.bare == place:
                self.source = on_device_of(self.sae, view(x, self.read.transforms).value)
                self.encoded = self.sae.encode_source(self.source, 0)
                self.copy = self.encoded.clone()
            for output, written in enumerate(self.written):
                if written.bare == place:
                    if self.copy is None or self.encoded is None or self.source is None:
                        raise InputError(
                            f"This model computes {written} before {self.read}, which the SAE (base model "
                            f"{self.sae.config.base_model!r}) reads to write it: the SAE does not fit this model."
                        )
                    decoded = self.sae.decode_at([self.copy], output, self.source)
                    nothing = decoded - self.sae.decode_at([self.encoded], output, self.source)
                    x = x + (nothing.to(x.device) * view(x.detach(), written.transforms).factor).to(x.dtype)
        return x


class _Differentiable(Observation):
    """An observation with gradients with respect to all activations that it keeps, and to latents."""

    def __init__(self, places: Collection[TensorPath], anchors: Sequence[_Anchor]) -> None:
        super().__init__(places, grad=places)
        self.anchors = anchors

    def going_on(self, place: TensorPath, kept: Tensor) -> Tensor:
        standing = super().going_on(place, kept)
        for anchor in self.anchors:
            standing = anchor.at(place, standing)
        return standing


def capture(
    model: Any,
    what: Sequence[Wanted] | Wanted,
    *,
    grad: bool = False,
    **inputs: Any,
) -> dict[Any, Tensor]:
    """Run the model as far as needed and return activations and latents.

    Where interventions are attached, the activation is the edited one that the model continues with. The forward ends
    at the last site needed; it runs to its end if a cache is given, whose later layers would lack these tokens, and
    where accelerate or FSDP put weights away after each module.

    With ``grad=True`` everything captured is part of one graph, in which what comes later depends on what comes
    before, and on the latents: ``torch.autograd.grad(f(found["final_norm"]), found[sae])``. The SAE's error term
    stays, and no value changes. What comes later does not depend on the latents of SAEs that read several sites or
    were loaded in part; use `attribute` for these. An SAE whose latents depend on other tokens gets only the real
    tokens of each row: at padding its latents are 0.

    Args:
        model: any Hugging Face causal LM.
        what: sites and SAEs, or a single one.
        grad: keep the autograd graph, and run the model to its end.
        **inputs: the model's inputs, such as ``input_ids`` and ``attention_mask``.

    Returns:
        ``{site: activations [B, S, d], sae: latents [B, S, d_sae]}``, ordinary tensors even if the caller is in
        inference mode. A module path gives the tensor there in its own shape: the virtual tokens of prompt tuning are
        columns of it, and what all rows share, such as rotary embeddings, has one row.

    Raises:
        InputError: if there are no sites or SAEs; with ``grad=True`` also in inference mode.
        SiteError: if a site does not exist in this model or could not be proven.
        ShapeError: if an SAE is not as wide as its site, or the tensor there does not have a vector for each token.
        AttachError: if the forward did not reach a site, or the model is compiled; with ``grad=True`` also if a site
            is within a layer that gradient checkpointing runs again.
    """
    require_model("capture()", model)
    sites = sites_needed("capture()", what)
    anchored = [key for key in sites if grad and isinstance(key, SAEModel) and _Anchor.fits(key)]
    written = [str(site) for sae in anchored for site in sites_written(sae)]
    slots = prove(model, [*(site for several in sites.values() for site in several), *written])
    require_fitting(sites, slots)
    if grad:
        return _in_one_graph(model, sites, anchored, slots, inputs)
    stop = not must_finish(model) and cache_in(inputs, facts_of(unwrap(model)[0]).caches) is None
    observation = Observation({slot.tensor_path.bare for slot in slots.values()}, stop=stop)
    with torch.no_grad():
        observation.run(model, slots, inputs)
    with torch.inference_mode(False), torch.no_grad():
        return {key: _read(key, sites[key], slots, observation, inputs) for key in sites}


def _in_one_graph(
    model: Any,
    sites: Mapping[Any, Sequence[str]],
    anchored: Sequence[SAEModel],
    slots: Mapping[str, Slot],
    inputs: Mapping[str, Any],
) -> dict[Any, Tensor]:
    """Return activations and latents as parts of one graph, in which later ones depend on the anchored SAEs' latents.

    Raises:
        InputError: in inference mode.
        AttachError: if the forward did not reach a site, or gradient checkpointing would leave gaps in the graph.
    """
    require_autograd("capture(..., grad=True)")
    places = {slot.tensor_path.bare for slot in slots.values()}
    used = {
        slots[name].tensor_path.bare for sae in anchored for name in map(str, (*sites_read(sae), *sites_written(sae)))
    }
    _require_graph(model, places, used)
    anchors = {sae: _Anchor(sae, slots) for sae in anchored}
    with torch.enable_grad():
        observation = _Differentiable(places, list(anchors.values()))
        observation.run(model, slots, inputs)
        return {
            key: anchors[key].latents if key in anchors else _read(key, sites[key], slots, observation, inputs)
            for key in sites
        }


def sites_needed(caller: str, what: Any) -> dict[Any, list[str]]:
    """Return the names of the sites that each of the sites and SAEs in `what` needs.

    Raises:
        InputError: if there are none, or something is neither a site nor an SAE.
        SiteError: for a string that does not name a site.
    """
    if not isinstance(what, Iterable) and not isinstance(what, (Site, SAEModel)):
        raise InputError(f"{caller} was given {shown(what)}; expected sites or SAEs, such as 'resid_post.3'.")
    keys: list[Any] = [what] if isinstance(what, (str, Site, SAEModel)) else list(what)
    if not keys:
        raise InputError(f"{caller} was given no sites or SAEs; expected at least one, such as 'resid_post.3'.")
    for key in keys:
        if not isinstance(key, Hashable):
            raise InputError(f"{caller} was given a {type(key).__name__}; expected sites or SAEs.")
    return {
        key: [str(site) for site in sites_read(key)] if isinstance(key, SAEModel) else [str(Site.parse(key))]
        for key in keys
    }


def require_fitting(sites: Mapping[Any, Iterable[str]], slots: Mapping[str, Slot]) -> None:
    """Raise unless the SAEs among the keys read activations as wide as their sites.

    Raises:
        ShapeError: with both widths.
    """
    for key, several in sites.items():
        for site in several if isinstance(key, SAEModel) else ():
            require_read_width(key, site, slots[site].width)


def require_autograd(caller: str) -> None:
    """Raise in inference mode.

    Raises:
        InputError: saying what to do.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            f"{caller} was called inside torch.inference_mode(), which disables gradients: call it outside. It may "
            "be called inside torch.no_grad()."
        )


def run_again(model: nn.Module) -> dict[str, bool]:
    """Return the modules whose insides gradient checkpointing runs again, by path, and whether it is reentrant."""
    found = {}
    for path, module in unwrap(model)[0].named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and module.training and getattr(module, "gradient_checkpointing", False):
            found[path] = bool(isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"))
    return found


def _require_graph(model: nn.Module, read: Collection[TensorPath], anchored: Collection[TensorPath]) -> None:
    """Raise if gradient checkpointing would leave gaps in the graph.

    Args:
        model: the model.
        read: where activations are kept.
        anchored: where latents are put into the graph, which does not happen when a layer is run again.

    Raises:
        AttachError: saying what to do.
    """
    root = unwrap(model)[0]
    for path, reentrant in run_again(model).items():
        layer = root.get_submodule(path)
        if isinstance(layer, PreTrainedModel):  # only its layers are run again
            continue
        # Older versions of transformers also run the layer's own hooks again: they wrap its call, not its forward.
        own = path if type(layer).__call__ is not nn.Module.__call__ else None
        concerned = read if reentrant else anchored
        within = [place for place in concerned if place.path.startswith(f"{path}.") or place.path == own]
        if within:
            raise AttachError(
                f"capture(..., grad=True) was given {within[0]}, within a layer that gradient checkpointing runs "
                "again without the captured tensors: call model.eval() first, or name a site between layers"
                + ("." if set(within) & set(anchored) else ", or enable checkpointing with use_reentrant=False.")
            )


def on_device_of(sae: SAEModel, x: Tensor) -> Tensor:
    """Return an activation on an SAE's device, in its dtype."""
    return x.to(device=sae.b_dec.device, dtype=sae.dtype)


def sae_input(sae: SAEModel, activations: Sequence[Tensor]) -> Tensor:
    """Return what an SAE encodes, given the activations ``[..., d_in]`` of the sites that it reads."""
    x = [on_device_of(sae, activation) for activation in activations]
    return x[0] if sae.one_site else torch.stack(x, -2)


def _read(
    key: Any, sites: Sequence[str], slots: Mapping[str, Slot], observation: Observation, inputs: Mapping[str, Any]
) -> Tensor:
    """Return the activation, or an SAE's latents of it."""
    places = [slots[site].tensor_path for site in sites]
    seen = [view(observation.seen[place.bare], place.transforms).value for place in places]
    if not isinstance(key, SAEModel):
        return seen[0]
    for site, x in zip(sites, seen, strict=True):
        _require_rows(site, x, inputs)
    with exact_dtype(key.b_dec.device):
        x = sae_input(key, seen)
        return key.encode(x) if key.per_token else _encoded_by_sequence(key, x, inputs)


def _require_rows(site: str, x: Tensor, inputs: Mapping[str, Any]) -> None:
    """Raise unless a tensor that an SAE reads has a vector for each token; virtual tokens may come before them.

    Raises:
        ShapeError: with both shapes.
    """
    given = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if isinstance(given, Tensor) and (x.ndim < 3 or x.shape[0] != given.shape[0] or x.shape[1] < given.shape[1]):
        raise ShapeError(
            f"The tensor at {site} is {list(x.shape)} for {given.shape[0]} sequences of {given.shape[1]} tokens; "
            "expected [B, S, d], a vector for each token. Set another site in the SAE's configuration."
        )


def _encoded_by_sequence(sae: SAEModel, x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return latents ``[B, S, d_sae]`` that depend on the real tokens of each sequence, and are 0 at padding."""
    real = real_tokens(x, inputs)
    several = None if real is not None or "input_ids" not in inputs else sequences_in_rows(inputs)[0]
    if several is not None and (several.shape != x.shape[:2] or len(several.unique()) == len(several)):
        several = None  # each row is one sequence
    if real is None and several is None:
        return sae.encode(x)
    rows = torch.arange(len(x), device=x.device)[:, None]
    sequence = (rows if several is None else several.to(x.device)).expand(x.shape[:2])
    sequence = sequence if real is None else sequence.where(real, -1)
    latents = x.new_zeros(*sequence.shape, sae.config.d_sae)
    for number in sequence.unique().tolist():
        if number >= 0:
            row = int((sequence == number).any(-1).nonzero()[0])
            chosen = sequence[row] == number
            latents[row, chosen] = sae.encode(x[row : row + 1, chosen])[0]
    return latents
