"""Find and prove all places of one model, once per model."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Chain, find_chain
from .contributions import decompose, known_numbers
from .inputs import prove_inputs
from .interior import block_places, end_places
from .multi_rank import Ranks, declared_width, is_spread, meet, refuse_stages
from .norm_sites import Norms
from .probe import Seen, Subject, Trace, make_subject, number_of, quiet, trace, unwrap
from .projections import additive_modules
from .roles import Roles, assign_roles
from .site import LAYERED, Site
from .site_map import PathKey, SiteMap
from .slots import Slot, TensorPath
from .sums import Sums
from .writing import Proven, failing_writes

_Key = tuple[tuple[Hashable, ...], ...]
_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Found:
    """What one probe of a model gave.

    Args:
        sites: the map.
        scaled: the paths of blocks that may have learned factors, so that the map holds only for their present values.
        lacking: the paths of blocks in which a contribution may be missing because a module gave zeros, so that the
            map holds only until their weights change.
        lasting: whether the map is worth keeping; not if the model's numbers were not finite.
    """

    sites: SiteMap
    scaled: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class _Kept:
    """A map, and the state of the model for which it holds."""

    key: _Key
    values: list[Tensor | float]
    found: _Found


_CACHE: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def resolve(model: nn.Module, *, inputs: Mapping[str, Any] | None = None) -> SiteMap:
    """Find the sites of a model and prove them by a few tiny forwards; later calls return the same map.

    The model keeps no hook, and its train or eval mode and the random state are restored. It is probed again when its
    modules, their types of numbers or their forwards have changed, as they do when an adapter is added, or learned
    factors of what its blocks add, or weights of blocks that added nothing but zeros.

    Args:
        model: a causal language model, also wrapped by PEFT, torch.compile, DDP or FSDP, on any devices.
        inputs: keyword arguments for the probe, with ids ``[B, S]``; made up when None.

    Returns:
        The sites.

    Raises:
        SiteError: if a forward of the model raises, or the ranks of a model on several do not run the same tokens
            through the same layers.
    """
    root, _ = unwrap(model)
    refuse_stages(root)
    key = tuple(_identity(path, module) for path, module in root.named_modules())
    with _LOCK:
        cached = _CACHE.get(root)
        same = cached is not None and cached.key == key and inputs is None
        if cached is not None and same and _alike(cached.values, _state(root, cached.found)):
            return cached.found.sites
        subject = make_subject(model, inputs)
        meet(root)
        with quiet(root):
            found = _probe(subject)
        _CACHE.pop(root, None)
        if found.lasting and _is_watchable(root, found.lacking):
            _CACHE[root] = _Kept(key, _state(root, found), found)
    return found.sites


def _identity(path: str, module: nn.Module) -> tuple[Hashable, ...]:
    """Return what tells whether a module is still the same one and still computes in the same way."""
    forward = vars(module).get("forward")  # not the class's, which FSDP replaces by one that does the same
    dtypes = tuple(tensor.dtype for tensor in module._parameters.values() if tensor is not None)
    return path, id(module), id(getattr(forward, "__func__", forward)), dtypes


def _state(root: nn.Module, found: _Found) -> list[Tensor | float]:
    """Return all that a map depends on beside the model's modules."""
    return [*_small_values(root, found.scaled), *_changes(root, found.lacking)]


def _is_watchable(root: nn.Module, paths: Sequence[str]) -> bool:
    """Whether all weights of some modules are here, whole, and of a kind that tells when it changes."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and not is_spread(tensor)
        for path in paths
        for tensor in _weights(root, path)
    )


def _changes(root: nn.Module, paths: Sequence[str]) -> Iterator[float]:
    """Yield, for each weight of some modules, which tensor it is, how often it was written, and if it is all zero."""
    for path in paths:
        for tensor in _weights(root, path):
            # Writes through `.data` are not counted; but of them, too, those that end the zeros are seen.
            yield from (id(tensor), 0 if tensor.is_inference() else tensor._version, bool(tensor.any()))


def _weights(root: nn.Module, path: str) -> list[Tensor]:
    module = root.get_submodule(path)
    return [*module.parameters(), *module.buffers()]


def _own_vectors(block: nn.Module) -> set[int]:
    """Return the ids of a block's own numbers and vectors, which may be factors even if all of them are one now."""
    own = (*block.parameters(recurse=False), *block.buffers(recurse=False))
    return {id(tensor) for tensor in own if tensor.numel() == max(tensor.shape, default=1)}


def _small_values(root: nn.Module, paths: Sequence[str]) -> list[Tensor | float]:
    """Return copies of all in some blocks that their factors may come from: numbers, and the block's own vectors."""
    values: list[Tensor | float] = []
    for path in paths:
        block = root.get_submodule(path)
        own = _own_vectors(block)
        for tensor in (*block.parameters(), *block.buffers()):
            small = tensor.numel() == 1 or id(tensor) in own
            if small and tensor.device.type != "meta" and not is_spread(tensor):
                values.append(tensor.detach().to("cpu", copy=True))
        values += [value for value in vars(block).values() if isinstance(value, float)]
    return values


def _alike(before: Sequence[Tensor | float], after: Sequence[Tensor | float]) -> bool:
    """Whether two lists of tensors and numbers are equal."""
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )


def _probe(subject: Subject) -> _Found:
    root = subject.root
    seen = trace(subject)
    ranks = _ranks(subject, seen)
    paths = {key: _over(ranks, root, place) for key, place in _path_places(seen).items()}
    unwell = seen.not_finite()
    chain = unwell or find_chain(root, seen)
    if ranks is not None:  # each of the forwards to come takes all ranks, so that all have to go on alike
        ranks.require_same(_stream(chain), "a residual stream")
    if isinstance(chain, str):
        text_path = _text_path(subject, seen, None)
        sites = SiteMap(root, {}, {}, paths, 0, text_path, chain, Norms(subject, seen), {})
        return _Found(sites, lasting=unwell is None)
    config = getattr(root, "config", None)
    count = len(chain.layers) + len(chain.idle)
    blocks = dict(zip(chain.layers, chain.paths, strict=True))
    if chain.refusal:
        none = {Site(name, layer): chain.refusal for name in LAYERED for layer in range(count)}
        text_path = _text_path(subject, seen, chain)
        return _Found(SiteMap(root, {}, none, paths, count, text_path, chain.refusal, Norms(subject, seen), blocks))
    seen.forget_but(chain.entries[0].place.width)
    settings = config.to_dict() if config is not None else {}
    sums = decompose(chain, seen, root, settings)
    roles = assign_roles(subject, chain, sums, seen)
    additive = additive_modules(subject, seen, chain, sums)
    found: dict[Site, TensorPath | str] = {Site(name): place for name, place in end_places(root, seen, chain).items()}
    for index, (parts, role) in enumerate(zip(sums, roles, strict=True)):
        places = block_places(root, seen, chain, index, parts, role, additive)
        found |= {Site(name, chain.layers[index]): places[name] for name in LAYERED}
    found |= prove_inputs(subject, seen, chain, sums, roles, found)
    idle = "the block does not run on text alone"
    found |= {Site(name, layer): idle for name in LAYERED for layer in chain.idle}
    found = {site: _over(ranks, root, place) for site, place in found.items()}
    slots = {site: Slot(site, place, root) for site, place in found.items() if isinstance(place, TensorPath)}
    refused = {site: reason for site, reason in found.items() if isinstance(reason, str)}
    failing = failing_writes(Proven(subject, seen, chain, sums, roles), slots)
    if Site("resid_post", count - 1) in failing:  # the blocks of a part beside the model proper, such as a patcher
        failing |= dict.fromkeys(slots, f"what the blocks {chain.paths[0]} .. {chain.paths[-1]} give has no effect")
    slots = {site: slot for site, slot in slots.items() if site not in failing}
    text_path = _text_path(subject, seen, chain)
    norms = Norms(subject, seen)
    sites = SiteMap(root, slots, refused | failing, paths, count, text_path, chain.evidence, norms, blocks)
    scaled = tuple(
        path
        for path, parts in zip(chain.paths, sums, strict=True)
        if _is_scaled(parts, settings) or _own_vectors(root.get_submodule(path))
    )
    lacking = tuple(
        path
        for path, parts, role, unchanged in zip(chain.paths, sums, roles, chain.unchanged, strict=True)
        if unchanged or _lacks(seen, parts, role)
    )
    return _Found(sites, scaled, lacking)


def _is_scaled(sums: Sums | str, config: Mapping[str, Any]) -> bool:
    """Whether a block's sums have a factor that its configuration does not give."""
    factors = () if isinstance(sums, str) else (factor for stage in sums.stages for factor in stage.factors)
    known = known_numbers(config)
    return any(isinstance(factor, Tensor) or factor not in known for factor in factors)


def _lacks(seen: Trace, sums: Sums | str, roles: Roles | str) -> bool:
    """Whether some of a block's sites may be refused only because a module in it gave zeros, or what did not react."""
    if isinstance(sums, str) or isinstance(roles, str):
        return False
    whole = roles.mixers and roles.feeders
    return bool(roles.still or (sums.silent and not whole) or not all(seen.values[t.value].any() for t in sums.terms))


def _ranks(subject: Subject, seen: Trace) -> Ranks | None:
    """Compare what the ranks of tensor parallelism saw; None for a model that is not split so."""
    if seen.mesh is None:
        return None
    mine = {
        (path, port, item.place.keys): (item.value, tuple(seen.values[item.value].shape))
        for (path, port), items in seen.seen.items()
        for item in items
    }
    ranks = Ranks.compare(seen.mesh, mine)
    ranks.refuse_split_sequence(*subject.tokens())
    return ranks


def _stream(chain: Chain | str) -> list[str] | str:
    """Return all that a chain holds, or why there is none, in a form that ranks can exchange."""
    if isinstance(chain, str):
        return chain
    return [f"{seen.place}: {seen.value}" for seen in (*chain.entries, *chain.exits)]


def _over(ranks: Ranks | None, root: nn.Module, place: TensorPath | str) -> TensorPath | str:
    """Complete a place by how its tensor is split over ranks, or return the reason why that cannot be told."""
    if ranks is None or isinstance(place, str):
        return place
    declared = declared_width(root.get_submodule(place.path), place.port)
    shards = ranks.split((place.path, place.port, place.keys), declared)
    if shards is None or isinstance(shards, str):
        return place if shards is None else shards
    return dataclasses.replace(place, width=shards.width, shards=shards)


def _path_places(seen: Trace) -> dict[PathKey, TensorPath | str]:
    """Find, for each side of each module that ran, its tensors, and its activation: the first with a row per token."""
    places: dict[PathKey, TensorPath | str] = {}
    for path, count in seen.calls.items():
        for port in ("input", "output"):
            if count != 1:
                places[path, port, None] = f"the module ran {count} times in one forward"
                continue
            usable: list[Seen] = []
            for index, item in enumerate(seen.seen.get((path, port), [])):
                dtype = seen.values[item.value].dtype
                if item.place.rank in (2, 3) and dtype.is_floating_point:
                    usable.append(item)
                    places[path, port, index] = item.place
                else:
                    places[path, port, index] = f"that tensor is of {dtype} and rank {item.place.rank}"
            first = min(usable, key=lambda item: not item.is_tokens, default=None)
            nothing = f"the module's {port} has no floating-point tensor of rank 2 or 3"
            places[path, port, None] = nothing if first is None else first.place
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
