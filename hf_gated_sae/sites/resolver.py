"""Find and prove all sites of a model, once per model.

1. One recorded forward shows every tensor that modules take and return (`probe`).
2. The blocks are found (`blocks`), their contributions (`contributions`), and each contribution's role (`roles`).
3. Each semantic name gets a tensor (`interior`, `inputs`), or a reason why there is none.
4. Writes at all of these are tested (`writing`); a site that fails is refused, with the reason.

The result is cached until the model's modules, or the few weights that it depends on, change.
"""

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
from .interior import block_sites, end_sites
from .multi_rank import Ranks, declared_width, is_distributed, refuse_stages, wait_for_ranks
from .norm_sites import Norms
from .probe import Seen, Subject, Trace, digest_of, make_subject, quiet, trace, unwrap
from .projections import additive_modules
from .roles import Roles, assign_roles
from .site import LAYERED, Site
from .site_map import PathKey, SiteMap
from .slots import Slot, TensorPath
from .sums import Sums
from .writing import ProbeResult, failing_writes

_Key = tuple[tuple[Hashable, ...], ...]
_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Found:
    """The result of one probe of a model.

    Args:
        sites: the map.
        scaled: paths of blocks that may have learned factors: the map is valid only for their present values.
        incomplete: paths of blocks in which a contribution may be missing because a module returned zeros: the map is
            valid only until their weights change.
        cacheable: False if the model's numbers were not finite.
    """

    sites: SiteMap
    scaled: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    cacheable: bool = True


@dataclass(frozen=True, slots=True)
class _Cached:
    """A map, and the state of the model for which it is valid."""

    key: _Key
    values: list[Tensor | float]
    found: _Found


_CACHE: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()


def resolve(model: nn.Module, *, inputs: Mapping[str, Any] | None = None) -> SiteMap:
    """Find the sites of a model and prove them by a few tiny forwards; later calls return the same map.

    No hook stays on the model, and its train or eval mode and the random state are restored. It is probed again after
    a change of its modules, their dtypes or forwards (as by an adapter), of learned factors of its contributions, or
    of the weights of blocks that contributed only zeros.

    Args:
        model: a causal language model, also wrapped by PEFT, torch.compile, DDP or FSDP, on any devices.
        inputs: keyword arguments for the probe, with ids ``[B, S]``; made up when None.

    Returns:
        The sites.

    Raises:
        SiteError: if a forward of the model raises, or the ranks of a distributed model do not run the same tokens
            through the same layers.
    """
    root, _ = unwrap(model)
    refuse_stages(root)
    key = tuple(_identity(path, module) for path, module in root.named_modules())
    with _LOCK:
        cached = _CACHE.get(root)
        same = cached is not None and cached.key == key and inputs is None
        if cached is not None and same and _equal_values(cached.values, _state(root, cached.found)):
            return cached.found.sites
        subject = make_subject(model, inputs)
        wait_for_ranks(root)
        with quiet(root):
            found = _probe(subject)
        _CACHE.pop(root, None)
        if found.cacheable and _changes_are_visible(root, found.incomplete):
            _CACHE[root] = _Cached(key, _state(root, found), found)
    return found.sites


def _identity(path: str, module: nn.Module) -> tuple[Hashable, ...]:
    """Return a key that changes when a module is replaced, or computes in another way or dtype."""
    forward = vars(module).get("forward")  # not the class's, which FSDP replaces by one that does the same
    dtypes = tuple(tensor.dtype for tensor in module._parameters.values() if tensor is not None)
    return path, id(module), id(getattr(forward, "__func__", forward)), dtypes


def _state(root: nn.Module, found: _Found) -> list[Tensor | float]:
    """Return the weights and write counts that a map depends on, beside the model's modules."""
    return [*_small_values(root, found.scaled), *_changes(root, found.incomplete)]


def _changes_are_visible(root: nn.Module, paths: Sequence[str]) -> bool:
    """Whether all weights of some modules are plain, whole tensors in this process, whose writes torch counts."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and not is_distributed(tensor)
        for path in paths
        for tensor in _weights(root, path)
    )


def _changes(root: nn.Module, paths: Sequence[str]) -> Iterator[float]:
    """Yield each weight's identity, how often it was written, and whether it is not all zero, for some modules."""
    for path in paths:
        for tensor in _weights(root, path):
            # Writes through `.data` are not counted, but a weight that is no longer all zero is noticed.
            yield from (id(tensor), 0 if tensor.is_inference() else tensor._version, bool(tensor.any()))


def _weights(root: nn.Module, path: str) -> list[Tensor]:
    module = root.get_submodule(path)
    return [*module.parameters(), *module.buffers()]


def _own_vectors(block: nn.Module) -> set[int]:
    """Return the ids of a block's own numbers and vectors, which may be factors even if all are 1 now."""
    own = (*block.parameters(recurse=False), *block.buffers(recurse=False))
    return {id(tensor) for tensor in own if tensor.numel() == max(tensor.shape, default=1)}


def _small_values(root: nn.Module, paths: Sequence[str]) -> list[Tensor | float]:
    """Return copies of all possible factors in some blocks: single numbers, and the blocks' own vectors."""
    values: list[Tensor | float] = []
    for path in paths:
        block = root.get_submodule(path)
        own = _own_vectors(block)
        for tensor in (*block.parameters(), *block.buffers()):
            small = tensor.numel() == 1 or id(tensor) in own
            if small and tensor.device.type != "meta" and not is_distributed(tensor):
                values.append(tensor.detach().to("cpu", copy=True))
        values += [value for value in vars(block).values() if isinstance(value, float)]
    return values


def _equal_values(before: Sequence[Tensor | float], after: Sequence[Tensor | float]) -> bool:
    """Whether two lists of tensors and numbers are equal."""
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )


def _probe(subject: Subject) -> _Found:
    root = subject.root
    seen = trace(subject)
    ranks = _ranks(subject, seen)
    paths = {key: _with_shards(ranks, root, found) for key, found in _module_paths(seen).items()}
    not_finite = seen.not_finite()
    chain = not_finite or find_chain(root, seen)
    if ranks is not None:  # the following forwards need all ranks, so all must agree on the blocks
        ranks.require_same(_exchangeable(chain), "a residual stream")
    if isinstance(chain, str):
        text_path = _text_path(subject, seen, None)
        sites = SiteMap(root, {}, {}, paths, 0, text_path, chain, Norms(subject, seen), {})
        return _Found(sites, cacheable=not_finite is None)
    config = getattr(root, "config", None)
    count = len(chain.layers) + len(chain.idle)
    blocks = dict(zip(chain.layers, chain.paths, strict=True))
    if chain.refusal:
        refused = {Site(name, layer): chain.refusal for name in LAYERED for layer in range(count)}
        text_path = _text_path(subject, seen, chain)
        return _Found(SiteMap(root, {}, refused, paths, count, text_path, chain.refusal, Norms(subject, seen), blocks))
    seen.keep_width(chain.entries[0].tensor_path.width)
    settings = config.to_dict() if config is not None else {}
    sums = decompose(chain, seen, root, settings)
    roles = assign_roles(subject, chain, sums, seen)
    additive = additive_modules(subject, seen, chain, sums)
    found: dict[Site, TensorPath | str] = {Site(name): end for name, end in end_sites(root, seen, chain).items()}
    for index, (parts, role) in enumerate(zip(sums, roles, strict=True)):
        in_block = block_sites(root, seen, chain, index, parts, role, additive)
        found |= {Site(name, chain.layers[index]): in_block[name] for name in LAYERED}
    found |= prove_inputs(subject, seen, chain, sums, roles, found)
    idle = "the block does not run on text alone"
    found |= {Site(name, layer): idle for name in LAYERED for layer in chain.idle}
    found = {site: _with_shards(ranks, root, item) for site, item in found.items()}
    slots = {site: Slot(site, item, root) for site, item in found.items() if isinstance(item, TensorPath)}
    refused = {site: reason for site, reason in found.items() if isinstance(reason, str)}
    failing = failing_writes(ProbeResult(subject, seen, chain, sums, roles), slots)
    if Site("resid_post", count - 1) in failing:  # blocks beside the language model, such as those of a byte patcher
        no_effect = f"the output of the blocks {chain.paths[0]} .. {chain.paths[-1]} has no effect on the logits"
        failing |= dict.fromkeys(slots, no_effect)
    slots = {site: slot for site, slot in slots.items() if site not in failing}
    text_path = _text_path(subject, seen, chain)
    norms = Norms(subject, seen)
    sites = SiteMap(root, slots, refused | failing, paths, count, text_path, chain.evidence, norms, blocks)
    scaled = tuple(
        path
        for path, parts in zip(chain.paths, sums, strict=True)
        if _is_scaled(parts, settings) or _own_vectors(root.get_submodule(path))
    )
    incomplete = tuple(
        path
        for path, parts, role, unchanged in zip(chain.paths, sums, roles, chain.unchanged, strict=True)
        if unchanged or _may_lack_sites(seen, parts, role)
    )
    return _Found(sites, scaled, incomplete)


def _is_scaled(sums: Sums | str, config: Mapping[str, Any]) -> bool:
    """Whether a block's sums have a factor that is not a number of the configuration."""
    factors = () if isinstance(sums, str) else (factor for stage in sums.stages for factor in stage.factors)
    known = known_numbers(config)
    return any(isinstance(factor, Tensor) or factor not in known for factor in factors)


def _may_lack_sites(seen: Trace, sums: Sums | str, roles: Roles | str) -> bool:
    """Whether sites of a block may be refused only because one of its modules returned zeros or a constant."""
    if isinstance(sums, str) or isinstance(roles, str):
        return False
    complete = roles.mixers and roles.feed_forwards
    return bool(
        roles.unresponsive
        or (sums.zero_modules and not complete)
        or not all(seen.values[t.value].any() for t in sums.terms)
    )


def _ranks(subject: Subject, seen: Trace) -> Ranks | None:
    """Compare the recorded tensors of all ranks of tensor parallelism; None for a model that is not split."""
    if seen.mesh is None:
        return None
    mine = {
        (path, port, item.tensor_path.keys): (item.value, tuple(seen.values[item.value].shape))
        for (path, port), items in seen.seen.items()
        for item in items
    }
    ranks = Ranks.compare(seen.mesh, mine)
    ranks.refuse_split_sequence(*subject.tokens())
    return ranks


def _exchangeable(chain: Chain | str) -> list[str] | str:
    """Return the tensors of a chain, or why there is none, in a form that ranks can exchange."""
    if isinstance(chain, str):
        return chain
    return [f"{seen.tensor_path}: {seen.value}" for seen in (*chain.entries, *chain.exits)]


def _with_shards(ranks: Ranks | None, root: nn.Module, found: TensorPath | str) -> TensorPath | str:
    """Add to a tensor path how the tensor is split over ranks, or return the reason why that is not known."""
    if ranks is None or isinstance(found, str):
        return found
    declared = declared_width(root.get_submodule(found.path), found.port)
    shards = ranks.split((found.path, found.port, found.keys), declared)
    if shards is None or isinstance(shards, str):
        return found if shards is None else shards
    return dataclasses.replace(found, width=shards.width, shards=shards)


def _module_paths(seen: Trace) -> dict[PathKey, TensorPath | str]:
    """Return the tensors of each port of each module that ran, and the activation: the first with a row per token."""
    paths: dict[PathKey, TensorPath | str] = {}
    for path, count in seen.calls.items():
        for port in ("input", "output"):
            if count != 1:
                paths[path, port, None] = f"the module ran {count} times in one forward"
                continue
            usable: list[Seen] = []
            for index, item in enumerate(seen.seen.get((path, port), [])):
                dtype = seen.values[item.value].dtype
                if item.tensor_path.rank in (2, 3) and dtype.is_floating_point:
                    usable.append(item)
                    paths[path, port, index] = item.tensor_path
                else:
                    paths[path, port, index] = f"that tensor is of {dtype} and rank {item.tensor_path.rank}"
            first = min(usable, key=lambda item: not item.is_tokens, default=None)
            none_usable = f"the module's {port} has no floating-point tensor of rank 2 or 3"
            paths[path, port, None] = none_usable if first is None else first.tensor_path
    return paths


def _text_path(subject: Subject, seen: Trace, chain: Chain | None) -> str:
    """Return the path of the innermost module that takes the ids and contains the blocks."""
    ids = digest_of(subject.ids.detach().cpu())
    paths = [
        path
        for (path, port), items in seen.seen.items()
        if port == "input" and any(item.value == ids for item in items)
    ]
    containing = [path for path in paths if chain is not None and (not path or chain.paths[0].startswith(f"{path}."))]
    return max(containing, key=len, default="")
