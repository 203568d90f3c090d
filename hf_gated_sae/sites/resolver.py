"""Find and prove all places of one model, once per model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from .blocks import Chain, find_chain
from .contributions import decompose
from .interior import block_places, end_places
from .probe import Subject, Trace, make_subject, number_of, quiet, trace, unwrap
from .roles import assign_roles
from .site import LAYERED, Site
from .site_map import SiteMap
from .slots import Place, Slot
from .writing import Proven, failing_writes

_Key = tuple[tuple[str, int], ...]
_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[_Key, SiteMap]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def resolve(model: nn.Module, *, inputs: Mapping[str, Any] | None = None) -> SiteMap:
    """Find the sites of a model and prove them by a few tiny forwards; later calls return the same map.

    The model keeps no hook, and its train or eval mode and the random state are restored. It is probed again when its
    modules have changed, as they do when an adapter is added.

    Args:
        model: a causal language model, also wrapped by PEFT, torch.compile, DDP or FSDP, on any devices.
        inputs: keyword arguments for the probe, with ids ``[B, S]``; made up when None.

    Returns:
        The sites.

    Raises:
        SiteError: if a forward of the model raises.
    """
    root, _ = unwrap(model)
    key = tuple((path, id(module)) for path, module in root.named_modules())
    with _LOCK:
        cached = _CACHE.get(root)
        if cached is not None and cached[0] == key and inputs is None:
            return cached[1]
        subject = make_subject(model, inputs)
        with quiet(root):
            found = _probe(subject)
        _CACHE[root] = (key, found)
    return found


def _probe(subject: Subject) -> SiteMap:
    root = subject.root
    seen = trace(subject)
    paths = _path_places(seen)
    chain = find_chain(root, seen)
    if isinstance(chain, str):
        return SiteMap(root, {}, {}, paths, 0, _text_path(subject, seen, None), chain)
    config = getattr(root, "config", None)
    sums = decompose(chain, seen, config.to_dict() if config is not None else {})
    roles = assign_roles(subject, chain, sums, seen)
    found: dict[Site, Place | str] = {Site(name): place for name, place in end_places(root, seen, chain).items()}
    for layer, (parts, role) in enumerate(zip(sums, roles, strict=True)):
        places = block_places(root, seen, chain, layer, parts, role)
        found |= {Site(name, layer): places[name] for name in LAYERED}
    slots = {site: Slot(site, place, root) for site, place in found.items() if isinstance(place, Place)}
    refused = {site: reason for site, reason in found.items() if isinstance(reason, str)}
    failing = failing_writes(Proven(subject, seen, chain, sums, roles), slots)
    slots = {site: slot for site, slot in slots.items() if site not in failing}
    return SiteMap(
        root, slots, refused | failing, paths, len(chain.paths), _text_path(subject, seen, chain), chain.evidence
    )


def _path_places(seen: Trace) -> dict[tuple[str, str], Place | str]:
    """Choose, for each side of each module that ran, its activation: the first tensor with one row per token."""
    places: dict[tuple[str, str], Place | str] = {}
    for path, count in seen.calls.items():
        for port in ("input", "output"):
            items = seen.seen.get((path, port), [])
            usable = [s for s in items if s.place.rank in (2, 3) and seen.values[s.value].is_floating_point()]
            usable.sort(key=lambda item: not item.is_tokens)
            if count != 1:
                places[path, port] = f"the module ran {count} times in one forward"
            elif usable:
                places[path, port] = usable[0].place
            else:
                places[path, port] = f"the module's {port} has no floating-point tensor of rank 2 or 3"
    return places


def _text_path(subject: Subject, seen: Trace, chain: Chain | None) -> str:
    """Return the innermost module that took the ids and holds the blocks."""
    ids = number_of(subject.ids.detach().cpu())
    paths = [
        path
        for (path, port), items in seen.seen.items()
        if port == "input" and any(item.value == ids for item in items)
    ]
    holding = [path for path in paths if chain is not None and (not path or chain.paths[0].startswith(f"{path}."))]
    return max(holding, key=len, default="")
