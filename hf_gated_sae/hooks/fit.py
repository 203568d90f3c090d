"""How well an SAE reconstructs what passes some places of a model: one forward, and no edits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError, SiteError
from ..functional import FidelityAccumulator
from ..modeling import SAEModel
from ..sites import Site, SiteMap, Slot, Transform
from ..sites.probe import make_subject, quiet
from ..sites.sharding import must_finish
from ..sites.site import GLOBAL, LAYERED
from ..sites.transforms import view
from .carry import exact_dtype
from .observation import CountedTokens, Observation

OUTLIER = 8.0
"""A token with an activation so many times as long as the median one is left out: it takes no part in the text."""
FEWEST = 8
"""Activations from which something can be told."""


class Fit(NamedTuple):
    """What an SAE makes of the activations of a text.

    Attributes:
        tokens: number of activations.
        fvu: fraction of variance unexplained; of the output that is worst off, where there are several.
        l0: mean number of non-zero latents per token.
        norm: root mean square of ``|x - mean x|``, the length of the activations without what all have in common;
            NaN if they are reconstructed without any error.
    """

    tokens: int
    fvu: float
    l0: float
    norm: float


def activations(model: nn.Module, slots: Mapping[str, Slot], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run a model as far as needed, quietly, and return what passes some of its places.

    Args:
        model: the model as the user calls it; whatever is attached to it has to stand aside.
        slots: the places by name.
        inputs: keyword arguments of the forward, with ids ``[B, S]``.

    Returns:
        Activations of the tokens that are neither padding nor special, ``[n, width]`` by name.

    Raises:
        ShapeError: if what passes a place has no vector for each token.
    """
    subject = make_subject(model, inputs)
    observation = Observation((slot.place.bare for slot in slots.values()), stop=not must_finish(model))
    with quiet(subject.root):
        observation.probe(subject, slots)
    counted = CountedTokens.of(subject.root, inputs)
    return {
        name: counted.chosen(view(observation.seen[slot.place.bare], slot.place.transforms).value, name)
        for name, slot in slots.items()
        if slot.place.bare in observation.seen
    }


def fit(sae: SAEModel, read: Sequence[Tensor], written: Sequence[Tensor]) -> Fit:
    """Measure an SAE on activations.

    Args:
        sae: the SAE, with all of its latents.
        read: what passes each site that it reads, ``[n, d_in]``.
        written: what passes each site that it writes, ``[n, d_out]``.

    Returns:
        The measured numbers.

    Raises:
        InputError: if there are too few tokens, or the activations or what the SAE makes of them are not finite.
    """
    device = sae.b_dec.device
    every = [*read, *written]
    if not all(bool(x.isfinite().all()) for x in every):
        raise InputError(
            f"The activations that {type(sae).__name__} was to be checked on are not finite: the model itself "
            "overflows there in its dtype. Load it in another one, or pass check=False to attach all the same."
        )
    ordinary = _ordinary(every)
    if int(ordinary.sum()) < FEWEST:
        raise InputError(
            f"An SAE was to be checked on {int(ordinary.sum())} tokens; expected at least {FEWEST} that are neither "
            "padding nor special."
        )
    x = [each[ordinary.to(each.device)].to(device=device, dtype=sae.dtype) for each in read]
    with exact_dtype(device):
        output = sae(x[0] if sae.one_site else torch.stack(x, -2))
    results = []
    for number, target in enumerate(written):
        y = output.reconstruction if sae.one_site else output.reconstruction[..., number, :]
        b_dec = sae.b_dec.detach() if sae.one_site else sae.b_dec[number]
        target = target[ordinary.to(target.device)].to(device)
        accumulator = FidelityAccumulator(sae.config.d_sae, b_dec)
        accumulator.update(target, y, output.latents)
        metrics = accumulator.compute()
        if not math.isfinite(metrics.mse):
            raise InputError(
                f"What the SAE makes of the activations is not finite in {sae.dtype}: load it in float32, or look "
                "into its weights."
            )
        results.append(Fit(metrics.tokens, metrics.fvu, metrics.l0, metrics.centred_norm))
    return max(results, key=lambda each: -math.inf if math.isnan(each.fvu) else each.fvu)


def _ordinary(every: Sequence[Tensor]) -> Tensor:
    """Return which tokens have nowhere an activation of another order than the others, ``[n]``."""
    lengths = [x.float().norm(dim=-1).cpu() for x in every]
    near = [length <= OUTLIER * length.median() for length in lengths if len(length)]
    return torch.stack(near).all(0) if near else torch.zeros(0, dtype=torch.bool)


def siblings(found: SiteMap, root: nn.Module, site: Site, width: int) -> dict[str, Slot]:
    """Return the places that a site could be mistaken for: those near it, its block's modules, and other views of it.

    Args:
        found: the sites of the model.
        root: the model without wrappers.
        site: the site.
        width: what its activations have to be wide.

    Returns:
        Slots by name, without that of the site itself.
    """
    own = found[site]
    places = {own.place}
    slots = {}
    for name in _names_near(found, root, site, own):
        try:
            slot = found[name]
        except SiteError:  # that one does not exist in this model, or is refused
            continue
        if slot.width == width and slot.place not in places:
            places.add(slot.place)
            slots[name] = slot
    return slots


def _names_near(found: SiteMap, root: nn.Module, site: Site, own: Slot) -> Iterator[str]:
    bare = str(site.bare)
    yield bare
    yield from (f"{bare}|{name}" for name in ("center", "norm_no_gain", "unit_norm"))
    if site.name == GLOBAL[0]:
        yield from (f"{bare}|{Transform('scale', own.width**power)}" for power in (-0.5, 0.5))
    yield from GLOBAL
    layer = _layer(site, found.n_layers)
    for near in (layer, layer - 1, layer + 1):
        if 0 <= near < found.n_layers:
            yield from (f"{name}.{near}" for name in LAYERED)
    block = own.place.path.split(f".{layer}.")[0] + f".{layer}"
    with suppress(AttributeError):  # the site lies outside the blocks
        yield from (f"{block}.{name}.output" for name, _ in root.get_submodule(block).named_children())


def _layer(site: Site, count: int) -> int:
    """Return the block that a site is in, or next to."""
    numbers: Iterable[str] = filter(str.isdigit, site.name.split(".")) if site.is_path else ()
    nearest = 0 if site.name == GLOBAL[0] else max(count - 1, 0)
    return site.layer if site.layer is not None else int(next(iter(numbers), nearest))
