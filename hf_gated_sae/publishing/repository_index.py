"""The index of a repository with several SAEs: `sae_set.json` and the README in its root."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import PublishError
from ..modeling import SAEModel
from .card import card_data, is_repo_id
from .facts import CardFacts
from .markdown import cell, marked, number, with_front_matter

INDEX_FILE = "sae_set.json"
SECTION = "index"
COLUMNS = ("l0", "fvu", "loss_recovered")


def conversion_of(provenance: object) -> dict[str, str]:
    """Return the entries ``converted from``, ``address`` and ``dtype`` of an SAE's provenance.

    >>> conversion_of({"converted from": "acme/saes@c0ffee", "address": "layer_1", "trained in": "2024"})
    {'converted from': 'acme/saes@c0ffee', 'address': 'layer_1'}
    """
    known = provenance if isinstance(provenance, dict) and "converted from" in provenance else {}
    return {name: str(known[name]) for name in ("converted from", "address", "dtype") if name in known}


def entry(sae: SAEModel, facts: CardFacts) -> dict[str, Any]:
    """Return the index entry of one SAE."""
    config = sae.config
    described = {name: getattr(config, name) for name in ("architecture", "base_model", "site", "d_in", "d_sae")}
    metrics = {name: facts.metrics[name] for name in COLUMNS if name in facts.metrics}
    conversion = conversion_of(facts.provenance)
    return {**described, "metrics": metrics, **({"conversion": conversion} if conversion else {})}


def read_index(text: str | None) -> dict[str, dict[str, Any]]:
    """Return the entries of ``sae_set.json`` by subfolder; none if there is no file.

    Raises:
        PublishError: if the file does not have the expected structure.
    """
    if text is None:
        return {}
    try:
        entries = json.loads(text)["saes"]
        return {str(folder): dict(found) for folder, found in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(f"The repository's {INDEX_FILE} cannot be read ({error}): correct or delete it.") from error


def updated_index(
    entries: Mapping[str, dict[str, Any]],
    folders: list[str],
    subfolder: str,
    new: dict[str, Any],
    describe: Callable[[str], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the entries after one SAE was added.

    Args:
        entries: of the stored index.
        folders: the folders of the repository that hold an SAE; entries of others are dropped.
        subfolder: of the new SAE.
        new: its entry.
        describe: returns the entry of a folder that is not in the stored index.
    """
    found = {
        folder: entries[folder] if folder in entries else describe(folder) for folder in folders if folder != subfolder
    }
    return dict(sorted({**found, subfolder: new}.items()))


def index_json(entries: Mapping[str, dict[str, Any]]) -> str:
    """Return the content of ``sae_set.json``."""
    return json.dumps({"schema": 1, "library": "hf-gated-sae", "saes": dict(entries)}, indent=2) + "\n"


def index_card(repo_id: str, entries: Mapping[str, dict[str, Any]], sae: SAEModel, facts: CardFacts) -> str:
    """Return the root README that lists the SAEs; `sae` is the one that is being published."""
    columns = " | ".join(COLUMNS)
    lines = [
        f"## Sparse autoencoders in this repository ({len(entries)})",
        "",
        f"| subfolder | architecture | site | base model | d_sae | {columns} |",
        f"|---|---|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for folder, found in entries.items():
        metrics = found.get("metrics") or {}
        numbers = [number(metrics[name]) if name in metrics else "not measured" for name in COLUMNS]
        texts = [cell(found.get(name) or "not stated") for name in ("architecture", "site", "base_model", "d_sae")]
        lines.append("| " + " | ".join([f"[`{folder}`](./{folder}/README.md)", *texts, *numbers]) + " |")
    lines += [
        "",
        "```python",
        "from hf_gated_sae import SAEModel",
        "",
        f'sae = SAEModel.from_pretrained("{repo_id}", subfolder="{next(iter(entries))}")',
        "```",
    ]
    data = card_data(sae, facts, repo_id).to_dict()
    bases = sorted({str(found["base_model"]) for found in entries.values() if is_repo_id(found.get("base_model"))})
    architectures = sorted({str(found.get("architecture")).replace("_", "-") for found in entries.values()})
    data["tags"] = ["sparse-autoencoder", *(f"{name}-sae" for name in architectures), "interpretability"]
    data.pop("model-index", None)  # the numbers of one SAE only
    if bases:
        data.update(base_model=bases[0] if len(bases) == 1 else bases, base_model_relation="adapter")
    return with_front_matter(data, marked(SECTION, "\n".join(lines)))
