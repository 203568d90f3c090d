"""List the sites with which an SAE's own is easily confused, the likeliest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from torch import nn

from ..errors import SiteError
from ..interventions.base import sites_read, sites_written
from ..modeling import SAEModel
from ..sites import Site, SiteMap, Slot, Transform
from ..sites.site import GLOBAL, LAYERED

MOST_FAR = 64
"""Maximum number of other sites to try."""


class SitePair(NamedTuple):
    """Where an SAE reads and writes, by name: the same site twice, unless it is a transcoder."""

    read: str
    written: str


@dataclasses.dataclass(frozen=True)
class AlternativeSites:
    """Other sites for an SAE that reads and writes one site each.

    Attributes:
        slots: all of them by name.
        stages: the pairs to try; a stage is tried only if no earlier one has a pair that fits better.
    """

    slots: dict[str, Slot]
    stages: list[list[SitePair]]


def near_sites(found: SiteMap, sae: SAEModel) -> AlternativeSites:
    """Return the same site in the layers before and after, and the other sites of the same layer.

    For a transcoder, these are both of its sites, or one of them, in the layers before and after.

    Args:
        found: the sites of the model.
        sae: the SAE, which reads and writes one site each.
    """
    [read], [written] = sites_read(sae), sites_written(sae)
    if sae.config.is_transcoder:
        slots: dict[str, Slot] = {}
        pairs = []
        for by in (-1, 1):
            here = _existing(found, [_shifted(read, by)], sae.config.d_in, found[read])
            there = _existing(found, [_shifted(written, by)], sae.d_out, found[written])
            pairs += [SitePair(a, b) for a in here for b in there]
            pairs += [SitePair(a, str(written)) for a in here] + [SitePair(str(read), b) for b in there]
            slots |= here | there
        return AlternativeSites(slots, [pairs])
    layer = _layer(read, found.n_layers)
    names: list[str | None] = [_shifted(read, -1), _shifted(read, 1), *_in_layer(found, layer, read.transforms)]
    slots = _existing(found, names, sae.config.d_in, found[read])
    return AlternativeSites(slots, [[SitePair(name, name) for name in slots]])


def far_sites(found: SiteMap, root: nn.Module, sae: SAEModel) -> AlternativeSites:
    """Return all sites with which the SAE's could be confused.

    These are the same site of every layer, the sites and modules of its block and of the adjacent ones, and the site
    under other transforms.

    Args:
        found: the sites of the model.
        root: the model without wrappers.
        sae: the SAE, which reads and writes one site each.
    """
    [read], [written] = sites_read(sae), sites_written(sae)
    here = _existing(found, _names_far(found, root, read), sae.config.d_in, found[read])
    if not sae.config.is_transcoder:
        same = [SitePair(name, name) for name in here]
        if sae.config.normalization != "none":
            return AlternativeSites(here, [same])
        # It may be a transcoder whose configuration states only one of its sites.
        there = _existing(found, _names_beside(found, root, written), sae.d_out, found[written])
        beside = _existing(found, _names_beside(found, root, read), sae.config.d_in, found[read])
        return AlternativeSites(here | there | beside, [same, _one_side(read, written, beside, there)])
    shifts = [by for by in _by_distance(found, read) if by]
    both = [(_shifted(read, by), _shifted(written, by)) for by in shifts]
    here = _existing(found, [*_names_beside(found, root, read), *(a for a, _ in both)], sae.config.d_in, found[read])
    there = _existing(found, [*_names_beside(found, root, written), *(b for _, b in both)], sae.d_out, found[written])
    pairs = [SitePair(a, b) for a, b in both if a in here and b in there]
    return AlternativeSites(here | there, [[*_one_side(read, written, here, there), *pairs]])


def _one_side(read: Site, written: Site, here: Iterable[str], there: Iterable[str]) -> list[SitePair]:
    return [*(SitePair(name, str(written)) for name in here), *(SitePair(str(read), name) for name in there)]


def _existing(found: SiteMap, names: Iterable[str | None], width: int, own: Slot) -> dict[str, Slot]:
    """Return the slots of that width among `names`, each tensor once, without the SAE's own."""
    places = {own.tensor_path}
    slots: dict[str, Slot] = {}
    for name in names:
        if name is None or len(slots) == MOST_FAR:
            continue
        try:
            slot = found[name]
        except SiteError:  # it does not exist in this model, or is refused
            continue
        if slot.width == width and slot.tensor_path not in places:
            places.add(slot.tensor_path)
            slots[name] = slot
    return slots


def _names_far(found: SiteMap, root: nn.Module, site: Site) -> Iterator[str | None]:
    yield from _names_beside(found, root, site)
    yield from (_shifted(site, by) for by in _by_distance(found, site))


def _names_beside(found: SiteMap, root: nn.Module, site: Site) -> Iterator[str]:
    """Yield a site under other transforms, the sites of its block and the adjacent ones, and its block's modules."""
    own, bare = found[site], str(site.bare)
    yield bare
    yield from (f"{bare}|{name}" for name in ("center", "norm_no_gain", "unit_norm"))
    if site.name == GLOBAL[0]:
        yield from (f"{bare}|{Transform('scale', own.width**power)}" for power in (-0.5, 0.5))
    yield from GLOBAL
    layer = _layer(site, found.n_layers)
    for near in (layer, layer - 1, layer + 1):
        if 0 <= near < found.n_layers:
            yield from (f"{name}.{near}" for name in LAYERED)
    block = own.tensor_path.path.split(f".{layer}.")[0] + f".{layer}"
    with suppress(AttributeError):  # the site lies outside the blocks
        yield from (f"{block}.{name}.output" for name, _ in root.get_submodule(block).named_children())


def _in_layer(found: SiteMap, layer: int, transforms: tuple[Transform, ...]) -> Iterator[str]:
    """Yield the sites of a layer under some transforms, with `embed` for the first, `final_norm` for the last one."""
    if layer == 0:
        yield str(Site(GLOBAL[0]).transformed(*transforms))
    yield from (str(Site(name, layer).transformed(*transforms)) for name in LAYERED)
    if layer == found.n_layers - 1:
        yield str(Site(GLOBAL[1]).transformed(*transforms))


def _by_distance(found: SiteMap, site: Site) -> list[int]:
    """Return the offsets from a site's layer to every layer, the smallest first."""
    layer = _layer(site, found.n_layers)
    return sorted((other - layer for other in range(found.n_layers)), key=abs)


def _shifted(site: Site, by: int) -> str | None:
    """Return the name of the same site `by` layers later; None if it has no layer, or that layer is negative."""
    if site.layer is not None:
        moved = site.layer + by
        return None if moved < 0 else str(dataclasses.replace(site, layer=moved))
    parts = site.name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    if number is None or int(parts[number]) + by < 0:
        return None
    parts[number] = str(int(parts[number]) + by)
    return str(dataclasses.replace(site, name=".".join(parts)))


def _layer(site: Site, count: int) -> int:
    """Return the block that a site is in, or next to."""
    numbers: Iterable[str] = filter(str.isdigit, site.name.split(".")) if site.is_path else ()
    nearest = 0 if site.name == GLOBAL[0] else max(count - 1, 0)
    return site.layer if site.layer is not None else int(next(iter(numbers), nearest))
