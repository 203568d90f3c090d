"""All proven places of one model, found once per model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import SiteError, did_you_mean
from .blocks import Chain, find_chain
from .contributions import decompose
from .interior import block_places, end_places
from .probe import Subject, Trace, make_subject, number_of, quiet, trace, unwrap
from .roles import assign_roles
from .site import LAYERED, Site
from .slots import Place, Slot
from .writing import Proven, failing_writes

_Key = tuple[tuple[str, int], ...]
_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[_Key, SiteMap]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


class SiteMap:
    """The places of one model by name.

    Args:
        root: the model without wrappers; only a weak reference is kept.
        slots: the proven semantic sites.
        refused: the other semantic sites, each with the reason.
        paths: for each side of each module, the place of its activation, or why it has none.
        layers: number of blocks.
        text_path: path of the module that sees the ids and holds the blocks.
        evidence: how the blocks were found, or why they were not.
    """

    def __init__(
        self,
        root: nn.Module,
        slots: Mapping[Site, Slot],
        refused: Mapping[Site, str],
        paths: Mapping[tuple[str, str], Place | str],
        layers: int,
        text_path: str,
        evidence: str,
    ) -> None:
        self.n_layers = layers
        self.refused = dict(refused)
        self.evidence = evidence
        self._root = weakref.ref(root)
        self._slots = dict(slots)
        self._paths = dict(paths)
        self._text_path = text_path

    @property
    def text_model(self) -> nn.Module:
        """The module that sees the ids and holds the blocks."""
        root = self._root()
        if root is None:
            raise SiteError("The model whose sites these are no longer exists.")
        return root.get_submodule(self._text_path)

    def names(self) -> list[str]:
        """Return every proven semantic name in execution order."""
        return [str(site) for site in sorted(self._slots, key=lambda site: self._slots[site].order)]

    def __contains__(self, name: object) -> bool:
        """Whether the name is a site that can be used."""
        try:
            self[name]  # type: ignore[index]  # whatever is no site is refused by the grammar
        except SiteError:
            return False
        return True

    def __getitem__(self, name: str | Site) -> Slot:
        """Return the slot of a site.

        Module paths are those in the model, ``model.layers.3.mlp.output``; one inside its ``base_model``, without the
        first name, is understood, too.

        Raises:
            SiteError: if the name is no site, the layer or module does not exist, or the site could not be proven.
        """
        site = Site.parse(name)
        if site in self._slots:
            return self._slots[site]
        if site.is_path:
            return self._at_path(site)
        if site.layer is not None and self.n_layers and site.layer >= self.n_layers:
            raise SiteError(
                f"There is no site '{site}': the model has {self.n_layers} layers, 0 to {self.n_layers - 1}."
            )
        reason = self.refused.get(site, self.evidence)
        raise SiteError(
            f"The site '{site}' could not be proven in this model, because {reason}. Proven: {self._summary()}. "
            "A module path such as 'model.layers.0.output' names a place directly."
        )

    def _at_path(self, site: Site) -> Slot:
        root = self._root()
        if root is None:
            raise SiteError("The model whose sites these are no longer exists.")
        assert site.port is not None
        found = self._paths.get((site.name, site.port))
        if found is None:  # perhaps a path inside the base model, as some checkpoints write it
            found = self._paths.get((f"{_base_path(root)}.{site.name}", site.port))
        if found is None:
            known = [path for path, _ in root.named_modules() if path]
            if site.name in known:
                raise SiteError(f"The module {site.name!r} did not run in the probe, so '{site}' has no activation.")
            raise SiteError(f"The model has no module {site.name!r}.{did_you_mean(site.name, known)}")
        if isinstance(found, str):
            raise SiteError(f"'{site}' cannot be used as a site: {found}.")
        return Slot(site, found, root)

    def _summary(self) -> str:
        """Name what is proven, without one entry per layer."""
        return (
            ", ".join(dict.fromkeys(f"{site.name}.L" if site.layer is not None else site.name for site in self._slots))
            or "none"
        )

    def __repr__(self) -> str:
        """Name what is proven."""
        return f"SiteMap({self.n_layers} layers; {self._summary()})"


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


def _base_path(root: nn.Module) -> str:
    """Return the path of what transformers calls a model's base model, empty if that is the model itself."""
    base = getattr(root, "base_model", root)
    return next((path for path, module in root.named_modules() if module is base), "")


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
