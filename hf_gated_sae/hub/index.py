"""The index of known SAEs: facts about published SAEs that their repositories do not state, in one compact file.

The file lists releases. A release is a repository, its base model, and groups of SAEs whose names follow one pattern::

    {"id": "layer_{layer}/width_{width}/canonical", "address": "layer_{layer}/width_{width}/average_l0_{l0}",
     "site": "resid_post.{layer}", "d_sae": "{width}", "l0": "{l0}", "axes": ["width", "layer", "l0"],
     "values": {"16k": {"0": "105", "1": "102"}, "65k": {"0-1": "73,77"}}}

`values` has one level per axis, the innermost a text; ``0-2`` stands for ``0,1,2``, and one key may name several
values that have the same content below. ``hub_scripts/build_index.py`` writes the file and names the facts' sources.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError, UnknownNameError, did_you_mean

FILE = Path(__file__).with_name("known_saes.json")
FACTS = ("base_model", "input_scale", "normalization", "neuronpedia")
"""Facts that `known_facts` returns; all others are read from the checkpoints."""
PATTERNS = (
    "id",
    "address",
    "site",
    "site_out",
    "d_sae",
    "architecture",
    "l0",
    "l0_kind",
    "input_scale",
    "neuronpedia",
)
"""Fields of a group that may be patterns; a constant number is written as a number."""
SHOWN = 8

_RANGE = re.compile(r"(\d+)-(\d+)")
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([km])", re.IGNORECASE)
_UNITS = {"k": 1_000, "m": 1_000_000}


@dataclass(frozen=True)
class KnownSAE:
    """One SAE of the index; fields that the index does not state are None.

    Attributes:
        release: name of its release in SAELens's registry; its repository if the registry does not have it.
        id: its name in the release.
        repo: repository on the Hub.
        address: its folder or file there.
        base_model: repository of the model that it was trained on.
        site: the site that it reads.
        site_out: the site that a transcoder writes.
        d_sae: number of latents.
        architecture: such as ``"jumprelu"``.
        l0: mean number of active latents per token.
        l0_kind: ``"measured"``; or ``"target"``, if `l0` is the target of training or the k of a TopK.
        input_scale: the constant that activations were multiplied by in training.
        normalization: as in `SAEConfig`.
        neuronpedia: name of its dashboards, as ``<model>/<sae>``.
    """

    release: str
    id: str
    repo: str
    address: str
    base_model: str | None = None
    site: str | None = None
    site_out: str | None = None
    d_sae: int | None = None
    architecture: str | None = None
    l0: float | None = None
    l0_kind: str | None = None
    input_scale: float | None = None
    normalization: str | None = None
    neuronpedia: str | None = None

    @property
    def layer(self) -> int | None:
        """The block of its site."""
        return layer_of(self.site)


class Release:
    """SAEs that were published together; the groups are expanded on first use.

    Attributes:
        name: its name; its repository if SAELens's registry has no name for it.
        repo: its repository on the Hub.
        base_model: repository of the model that they were trained on; None if it differs between them.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.name = name
        self.repo: str = content["repo"]
        self.base_model: str | None = content.get("base_model")
        self._content = content

    @cached_property
    def dashboard_models(self) -> frozenset[str]:
        """Neuronpedia's names, in lower case, of the models for which its SAEs have dashboards."""
        patterns = (group["neuronpedia"] for group in self._content["groups"] if "neuronpedia" in group)
        return frozenset(pattern.split("/")[0].lower() for pattern in patterns)

    @cached_property
    def saes(self) -> dict[str, KnownSAE]:
        """Its SAEs by their names in it."""
        shared = {"release": self.name, "repo": self.repo, "base_model": self.base_model}
        shared["normalization"] = self._content.get("normalization")
        made = (
            _sae(group, dict(zip(group["axes"], values, strict=True)), shared)
            for group in self._content["groups"]
            for values in (expanded(group["values"]) if group["axes"] else [()])
        )
        return {sae.id: sae for sae in made}


@cache
def releases() -> Mapping[str, Release]:
    """Return every release by its name."""
    content = json.loads(FILE.read_bytes())
    return {name: Release(name, found) for name, found in content["releases"].items()}


def known_saes(base_model: str | None = None) -> Iterator[KnownSAE]:
    """Yield the SAEs of the index; an SAE that several releases list appears once for each.

    Args:
        base_model: only those trained on this repository; letter case does not matter.
    """
    for release in releases().values():
        if base_model is None or (release.base_model or "").lower() == base_model.lower():
            yield from release.saes.values()


def known_facts(repo_id: str, address: str) -> Mapping[str, Any]:
    """Return facts about an SAE that its own files do not state.

    Args:
        repo_id: repository on the Hub.
        address: folder or file of the SAE inside it; ``""`` also names the only SAE of a repository.

    Returns:
        Facts by name, empty for an unknown repository: ``base_model`` (repository id; also for an unknown SAE, if all
        known ones of the repository share it), ``input_scale`` (the constant that activations were multiplied by in
        training), ``normalization`` (as in `SAEConfig`), ``neuronpedia`` (see `shorter_dashboard_name`).

    >>> known_facts("JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_8")
    {'base_model': 'mistralai/Mistral-7B-v0.1', 'normalization': 'unit_norm'}
    """
    facts: dict[str, Any] = {}
    for sae in _listed(repo_id, address):  # the first release that states a fact wins
        for name in FACTS:
            value = getattr(sae, name)
            if value is not None:
                known = facts.setdefault(name, value)
                facts[name] = shorter_dashboard_name(known, value) if name == "neuronpedia" else known
    shared = {release.base_model for release in releases().values() if release.repo == repo_id}
    if "base_model" not in facts and len(shared) == 1 and (base_model := shared.pop()):
        facts["base_model"] = base_model
    return facts


def shorter_dashboard_name(known: str, other: str | None) -> str:
    """Return the shorter of two Neuronpedia names of one SAE.

    The canonical SAE of each layer and width in Gemma Scope has two names: one with its L0, as every SAE has, and one
    without.

    >>> shorter_dashboard_name("gemma-2-2b/5-gemmascope-res-1m__l0-114", "gemma-2-2b/5-gemmascope-res-1m")
    'gemma-2-2b/5-gemmascope-res-1m'
    """
    return min(known, other or known, key=len)


def known_at(repo_id: str, address: str) -> KnownSAE | None:
    """Return the entry of an SAE in the first release that lists it; None for an unknown SAE."""
    return next(iter(_listed(repo_id, address)), None)


def resolve_alias(release_or_repo: str, id: str = "") -> tuple[str, str]:
    """Return the repository and address of an SAE from its release (or repository) and id.

    Args:
        release_or_repo: name of a release, such as ``"gemma-scope-2b-pt-res-canonical"``, or a repository id.
        id: an id of the release, or an address; may be omitted for a release of one SAE.

    Returns:
        Repository and address. A name that is not a release, and an id that none of a repository's releases has, are
        returned unchanged: they may exist without being in the index.

    Raises:
        UnknownNameError: if the release has no such id.
        InputError: if several SAEs of the repository have the id.

    >>> resolve_alias("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    ('google/gemma-scope-2b-pt-res', 'layer_12/width_16k/average_l0_82')
    >>> resolve_alias("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer3")
    ('Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50', 'layer3.sae.pt')
    """
    release = releases().get(release_or_repo)
    if release is not None and release.name != release.repo:
        return release.repo, _in_release(release, id)
    known = _by_address(release_or_repo)
    if not id or not known or id in known:
        return release_or_repo, id
    found = sorted({sae.address for saes in known.values() for sae in saes if _same_id(sae.id, id)})
    if len(found) > 1:
        raise InputError(
            f"Several SAEs of {release_or_repo} have the id {id!r}. Pass one of their addresses: "
            f"{', '.join(map(repr, found[:SHOWN]))}{', ...' if len(found) > SHOWN else ''}."
        )
    return release_or_repo, found[0] if found else id


def _listed(repo_id: str, address: str) -> list[KnownSAE]:
    """Return the entries of an SAE in the releases that list it; ``""`` also names the only SAE of a repository."""
    known = _by_address(repo_id)
    if not address and len(known) == 1:
        address = next(iter(known))
    return known.get(address, [])


def _in_release(release: Release, id: str) -> str:
    """Return the address of an SAE of a release."""
    if id in release.saes:
        return release.saes[id].address
    if not id:
        return next(iter(release.saes.values())).address if len(release.saes) == 1 else ""
    if id in _by_address(release.repo):
        return id
    shown = ", ".join(map(repr, list(release.saes)[:SHOWN])) + (", ..." if len(release.saes) > SHOWN else "")
    raise UnknownNameError(
        f"The release {release.name!r} has no SAE {id!r}.{did_you_mean(id, release.saes)} It has {shown}. To load an "
        f"SAE that is not in the index, pass its repository, {release.repo!r}, and its folder or file there."
    )


def _same_id(known: str, given: str) -> bool:
    """Whether two ids are equal when ``layer3`` and ``layer_3`` count as the same."""
    return known == given or re.sub(r"(layer)_(\d)", r"\1\2", known) == re.sub(r"(layer)_(\d)", r"\1\2", given)


@cache
def _by_address(repo_id: str) -> dict[str, list[KnownSAE]]:
    """Return the entries of a repository's SAEs by address."""
    found: dict[str, list[KnownSAE]] = {}
    for release in releases().values():
        if release.repo == repo_id:
            for sae in release.saes.values():
                found.setdefault(sae.address, []).append(sae)
    return found


def _sae(group: Mapping[str, Any], values: dict[str, str], shared: Mapping[str, Any]) -> KnownSAE:
    """Build an SAE from the patterns of its group and one combination of values."""
    patterns = {name: group[name] for name in PATTERNS if name in group}
    filled = {name: text.format_map(values) for name, text in patterns.items() if isinstance(text, str)}
    numbers: dict[str, Any] = {}
    for name, read in (("d_sae", size_of), ("l0", float), ("input_scale", float)):
        if name in patterns:
            numbers[name] = read(filled.pop(name, str(patterns[name])))
    if "l0" in numbers:
        filled.setdefault("l0_kind", "measured")
    return KnownSAE(**{**shared, "address": filled["id"], **filled, **numbers})


def expanded(tree: Mapping[str, Any] | str) -> Iterator[tuple[str, ...]]:
    """Yield every combination of values in a tree of them.

    >>> list(expanded({"16k": {"0-1": "7"}, "32k": {"1": "8,9"}}))
    [('16k', '0', '7'), ('16k', '1', '7'), ('32k', '1', '8'), ('32k', '1', '9')]
    """
    if isinstance(tree, str):
        yield from ((value,) for value in _values(tree))
    else:
        for key, below in tree.items():
            for value in _values(key):
                yield from ((value, *rest) for rest in expanded(below))


def _values(text: str) -> Iterator[str]:
    """Yield the values of a text such as ``0-2,7``."""
    for part in text.split(","):
        span = _RANGE.fullmatch(part)
        if span:
            yield from map(str, range(int(span[1]), int(span[2]) + 1))
        else:
            yield part


def size_of(text: str) -> int:
    """Return a width from its text: the power of two nearest to a short one such as ``16k``, else the number.

    >>> [size_of(width) for width in ("16k", "1m", "768")]
    [16384, 1048576, 768]
    """
    short = _SIZE.fullmatch(text)
    return 2 ** round(math.log2(float(short[1]) * _UNITS[short[2].lower()])) if short else int(text)


def has_size(d_sae: int | None, width: int | str) -> bool:
    """Whether an SAE has a width: an exact number, or a short one such as ``"16k"``, within 5 %.

    Raises:
        InputError: if `width` is neither.
    """
    if d_sae is None:
        return False
    short = _SIZE.fullmatch(str(width))
    if short:
        nominal = float(short[1]) * _UNITS[short[2].lower()]
        return abs(d_sae - nominal) <= nominal / 20
    if not str(width).isdigit():
        raise InputError(f"width is {width!r}; expected a number of latents, such as 16384, or '16k'.")
    return d_sae == int(width)


def layer_of(site: str | None) -> int | None:
    """Return the layer number in a site's name, None if it has none.

    >>> layer_of("resid_post.12"), layer_of("model.layers.3.output"), layer_of("embed")
    (12, 3, None)
    """
    found = _LAYER.search(site or "")
    return int(found[1]) if found else None
