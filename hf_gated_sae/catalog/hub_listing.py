"""List SAEs on the Hub by the tags of SAE repositories."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, get_session, is_offline_mode
from huggingface_hub.errors import OfflineModeIsEnabled

from ..errors import SAEError
from ..formats import sae_addresses
from ..hub.error_messages import TransportError
from ..hub.index import layer_of
from ..hub.location import Location
from ..hub.repository import Access, HubRepository
from .search_result import SearchResult

_log = logging.getLogger(__name__)

TAGS = ("hf-gated-sae", "sparse-autoencoder")
"""The tag of this library, and the one that SAEs of any library have."""
MOST_REPOSITORIES = 100
MOST_CONFIGURATIONS = 50
"""In a repository without a table of contents, the configurations of at most this many SAEs are read."""
PATIENCE = 5
"""Seconds within which the Hub must respond."""
CONTENTS = "sae_set.json"
CONFIG = "config.json"

Kind = TypeVar("Kind")
_LAYER = re.compile(r"(?:layers?|blocks|resid_\w+|mlp_\w+|attn_\w+|\bh|\bL)[._-]?(\d+)")


def on_the_hub(base_model: str | None, known: Collection[str], token: str | bool | None) -> list[SearchResult]:
    """Return the SAEs of repositories that carry one of the tags.

    Args:
        base_model: only repositories whose card names this one.
        known: repositories to skip.
        token: access token; None uses the stored one, False none.

    Returns:
        The SAEs; none, with a warning, if the Hub cannot be reached, and none when offline.
    """
    if is_offline_mode():
        return []
    api = HfApi(token=token)
    wanted = [f"base_model:{base_model}"] if base_model else []
    try:
        # One request without retries; the client tries a listing six times before it reports that there is no network.
        get_session().head(api.endpoint, timeout=PATIENCE)
        tagged = {
            info.id: info
            for tag in TAGS
            for info in api.list_models(filter=[tag, *wanted], full=True, limit=MOST_REPOSITORIES, token=token)
        }
    except (TransportError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.warning(
            "The Hub could not be reached (%s): only SAEs of the index are shown. live=False (--no-live) skips the "
            "request.",
            reason,
        )
        return []
    return [result for info in tagged.values() if info.id not in known for result in _saes_of(info, base_model, token)]


def _saes_of(info: ModelInfo, base_model: str | None, token: str | bool | None) -> list[SearchResult]:
    """Return the SAEs of one repository; none, with a warning, if its files cannot be read."""
    root = HubRepository(info.id, "", info.sha or "", [file.rfilename for file in info.siblings or []], Access(token))
    try:
        results = list(contents_of(root).values() if CONTENTS in root else _from_folders(root))
    except SAEError as error:
        _log.warning("%s is skipped: %s", info.id, error)
        return []
    base = base_model or _base_model(info)
    return [SearchResult(**{**result, "base_model": result.get("base_model") or base}) for result in results]


def contents_of(root: Location) -> dict[str, dict[str, Any]]:
    """Return the SAEs in a repository's table of contents, by address.

    Raises:
        CheckpointError: if it is not a JSON object.
    """
    found = {}
    for folder, entry in _mapping(root.read_json(CONTENTS).get("saes")).items():
        if isinstance(entry, dict):
            l0 = _number(_mapping(entry.get("metrics")).get("l0"))
            found[folder] = {**_row(root, folder, entry, _checked(entry.get("architecture"), str)), "l0": l0}
    return found


def _from_folders(root: Location) -> Iterator[dict[str, Any]]:
    """Yield the SAEs in the listing; those in this library's layout with facts from their configurations."""
    read = 0
    for address in sae_addresses(root):
        location = root.at(address)
        if location.file is None and CONFIG in location and read < MOST_CONFIGURATIONS:
            read += 1
            config = location.read_json(CONFIG)
            model_type = config.get("model_type")
            if isinstance(model_type, str) and model_type.endswith("_sae"):
                yield _row(root, address, config, model_type.removesuffix("_sae"))
                continue
        layer = _LAYER.search(address)
        yield {"repo": root.repo, "subfolder": address, "layer": int(layer[1]) if layer else None}


def _row(root: Location, address: str, entry: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """Return the fields of a result from a configuration, or from an entry of the table of contents."""
    site, site_out = (_checked(entry.get(name), str) for name in ("site", "site_out"))
    return {
        "repo": root.repo,
        "subfolder": address,
        "site": site,
        "site_out": site_out if site_out != site else None,
        "layer": layer_of(site),
        "base_model": _checked(entry.get("base_model"), str),
        "d_sae": _checked(entry.get("d_sae"), int),
        "architecture": architecture,
    }


def _base_model(info: ModelInfo) -> str | None:
    """Return the base model in the tags, None unless there is exactly one."""
    names = [tag.removeprefix("base_model:") for tag in info.tags or [] if tag.startswith("base_model:")]
    plain = [name for name in names if ":" not in name]  # others name the relation, too: base_model:adapter:owner/name
    return plain[0] if len(plain) == 1 else None


def _checked(value: Any, kind: type[Kind]) -> Kind | None:
    """Return a value from the Hub if it is of the expected type, else None."""
    return value if type(value) is kind else None


def _mapping(value: Any) -> dict[str, Any]:
    """Return a value from the Hub if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
