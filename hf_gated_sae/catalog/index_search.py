"""Find SAEs by what they are: in the index of known ones, and live on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import InputError, unknown_name
from ..formats import natural_order
from ..hub.hook_names import GLOBAL, IN_BLOCK
from ..hub.index import KnownSAE, has_size, known_saes, plainer, releases
from ..hub.model_names import repository_of
from ..hub.neuronpedia import sae_of_dashboards, unknown_dashboards
from .search_result import SearchResult

if TYPE_CHECKING:
    pass

SITES = ("resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out", "attn_z", "mlp_in", "mlp_neurons", "embed")
"""Kinds of sites in the order in which they are shown."""
MERGED = ("base_model", "site", "site_out", "d_sae", "architecture", "l0", "l0_kind", "neuronpedia")


def search(
    base_model: str | None = None,
    *,
    site: str | None = None,
    layer: int | None = None,
    width: int | str | None = None,
    architecture: str | None = None,
    near_l0: float | None = None,
    live: bool = True,
    token: str | bool | None = None,
) -> list[SearchResult]:
    """Return pretrained SAEs, from the index of known ones and from the tags of the Hub.

    What is asked for has to be known of an SAE for it to be found: an SAE in the index whose width, say, only its
    files tell is not among the results of a search by width. Anything on the Hub loads by its repository, found or
    not.

    Args:
        base_model: repository of the language model, or a short name of it such as ``"gpt2-small"``. In its place,
            a release of the index, or a name of dashboards on Neuronpedia, which lead to their own SAEs.
        site: where the SAE reads: a kind such as ``"resid_post"``, or a site such as ``"resid_post.12"``.
        layer: the block that it reads at.
        width: number of latents, or a short name such as ``"16k"``.
        architecture: such as ``"gated"``.
        near_l0: of SAEs by one publisher that differ in their L0, only the one nearest to this.
        live: whether to ask the Hub, too; without it, and with ``HF_HUB_OFFLINE=1``, nothing leaves this machine.
        token: access token; None uses the stored one, False none.

    Returns:
        The residual stream first; then by layer, publisher, width and L0.

    Raises:
        UnknownNameError: if nothing is known for a base model, or there is no such site or architecture.
        InputError: if `layer`, `width` or `near_l0` is not a number of that kind.

    >>> [found] = search("google/gemma-2-2b", site="resid_post.12", width="32k", near_l0=80, live=False)[:1]
    >>> found.code
    'SAEModel.from_pretrained("google/gemma-scope-2b-pt-res", "layer_12/width_32k/average_l0_76")'
    """
    _require_numbers(layer, near_l0)
    listed = _listed_as(base_model)
    base_model = _spelt_as_known(base_model)
    found = merged(map(_of_known, known_saes(base_model) if listed is None else listed))
    if live and listed is None:
        from .hub_listing import on_the_hub  # the client, which a search of the index does not need

        found += on_the_hub(base_model, {release.repo for release in releases().values()}, token)
    if base_model is not None and not found:
        raise unknown_dashboards(base_model) or unknown_name("base model", base_model, base_models())
    _require_known(site, architecture, found)
    fitting = [
        result
        for result in found
        if (site is None or _at(result.site, site))
        and (layer is None or result.layer == layer)
        and (width is None or has_size(result.d_sae, width))
        and (architecture is None or result.architecture == architecture)
    ]
    return sorted(fitting if near_l0 is None else nearest(fitting, near_l0), key=_order)


def base_models() -> list[str]:
    """Return the base models of the index."""
    return sorted({release.base_model for release in releases().values() if release.base_model})


def merged(results: Iterable[SearchResult]) -> list[SearchResult]:
    """Return every SAE once, with what the results about it know together; where they differ, the first one counts."""
    found: dict[tuple[str, str], SearchResult] = {}
    for result in results:
        first = found.setdefault((result.repo, result.subfolder), result)
        if first is not result:
            more = {name: getattr(result, name) for name in MERGED if getattr(first, name) is None}
            if first.neuronpedia is not None:
                more["neuronpedia"] = plainer(first.neuronpedia, result.neuronpedia)
            found[result.repo, result.subfolder] = replace(first, **more)
    return list(found.values())


def nearest(results: Sequence[SearchResult], l0: float) -> list[SearchResult]:
    """Return of results that differ in their L0 (and repository, but not in its owner) the one nearest to `l0`."""
    best: dict[tuple[Any, ...], SearchResult] = {}
    for result in results:
        if result.l0 is None:
            continue
        owner = result.repo.split("/")[0]
        key = (owner, result.base_model, result.site, result.site_out, result.d_sae, result.architecture)
        if key not in best or abs(result.l0 - l0) < abs((best[key].l0 or 0) - l0):
            best[key] = result
    return list(best.values())


def _of_known(sae: KnownSAE) -> SearchResult:
    """Return what the index knows as a result."""
    shared = {name: getattr(sae, name) for name in (*MERGED, "release", "repo", "layer")}
    return SearchResult(subfolder=sae.address, **shared)


def _listed_as(name: str | None) -> list[KnownSAE] | None:
    """Return the SAEs of a release, or the one that dashboards on Neuronpedia are of; None for any other name."""
    if name is None or _spelt_as_known(name) in base_models():
        return None
    if name in releases() and releases()[name].saes:
        return list(releases()[name].saes.values())
    sae = sae_of_dashboards(name)
    return None if sae is None else [sae]


def _spelt_as_known(base_model: str | None) -> str | None:
    """Return the repository that a name of a base model stands for, in the letter case of the index."""
    repository = repository_of(base_model)
    if repository is None:
        return None
    same = (known for known in base_models() if known.lower() == repository.lower())
    return next(same, repository)


def _require_numbers(layer: Any, near_l0: Any) -> None:
    """Raise for a layer or an L0 that can be none, which would find nothing, or anything.

    Raises:
        InputError: saying what was expected.
    """
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0):
        raise InputError(f"layer is {layer!r}; expected the number of a block, counted from 0, such as 12.")
    if near_l0 is not None and (
        isinstance(near_l0, bool) or not isinstance(near_l0, Real) or not 0 <= float(near_l0) < float("inf")
    ):
        raise InputError(f"near_l0 is {near_l0!r}; expected a mean number of active latents, such as 60.")


def _require_known(site: str | None, architecture: str | None, found: Sequence[SearchResult]) -> None:
    """Raise for a site or an architecture that does not exist, or exists nowhere here.

    Raises:
        UnknownNameError: with close matches.
    """
    if site is not None:
        kinds = {kind for kind, _ in IN_BLOCK.values()} | set(GLOBAL.values()) | set(SITES)
        kinds |= {_kind(result.site) for result in found if result.site}
        if _kind(site) not in kinds and not site.endswith((".input", ".output")):
            raise unknown_name("site", site, kinds)
    if architecture is not None:
        from ..modeling import architectures

        names = {*architectures, *(result.architecture for result in found if result.architecture)}
        if architecture not in names:
            raise unknown_name("architecture", architecture, names)


def _at(site: str | None, wanted: str) -> bool:
    """Whether a site is the wanted one, or of the wanted kind."""
    return site is not None and wanted in (site, _kind(site))


def _kind(site: str) -> str:
    """Return a site without its layer: ``resid_post`` of ``resid_post.12``; a module's path is its own kind."""
    kind, dot, block = site.rpartition(".")
    return kind if dot and block.isdigit() else site


def _order(result: SearchResult) -> tuple[Any, ...]:
    """Return the key by which results are shown; what is not known comes last."""
    kind = _kind(result.site) if result.site else ""
    numbers = (result.layer, result.d_sae, result.l0)
    layer, d_sae, l0 = (float("inf") if number is None else number for number in numbers)
    unfinished = "_step_" in result.subfolder  # saved during training
    place = SITES.index(kind) if kind in SITES else len(SITES)
    publisher = (result.release is None, result.l0 is None, result.l0_kind == "target", result.repo)
    return (
        unfinished,
        place,
        kind,
        layer,
        result.base_model or "",
        publisher,
        d_sae,
        l0,
        natural_order(result.subfolder),
    )
