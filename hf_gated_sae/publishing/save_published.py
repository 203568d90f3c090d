"""Saving an SAE with its facts and card beside weights and configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..modeling import SAEModel
from ..storage.atomic_write import written_together
from .card import model_card
from .facts import CardFacts, read_facts, write_facts
from .markdown import decoded, merge

CARD_FILE = "README.md"


def save(sae: SAEModel, folder: str | os.PathLike[str], facts: CardFacts | None = None, **kwargs: Any) -> Path:
    """Write weights, ``config.json``, ``sae_metrics.json`` and ``README.md``.

    All files are first written to a temporary folder: if anything fails, the target does not change. Hand-written
    parts of an existing README are kept.

    Args:
        sae: the SAE.
        folder: to write to, created if needed.
        facts: about the SAE; by default those stored with the checkpoint that `sae` was loaded from.
        **kwargs: as for `SAEModel.save_pretrained`, such as ``max_shard_size``.

    Returns:
        The folder.

    Raises:
        InputError: if the facts name a licence that is not on the Hub's list.
        PublishError: if the folder's README cannot be read.
    """
    target = Path(folder)
    readme = target / CARD_FILE
    existing = decoded(readme.read_bytes(), str(readme)) if readme.is_file() else None
    facts = (read_facts(sae) if facts is None else facts).licensed()
    with written_together(target) as staging:
        sae.save_pretrained(staging, **kwargs)
        write_extras(sae, staging, facts, existing_card=existing)
    return target


def write_extras(
    sae: SAEModel,
    folder: Path,
    facts: CardFacts,
    *,
    existing_card: str | None = None,
    repo_id: str | None = None,
    subfolder: str = "",
) -> list[Path]:
    """Write ``sae_metrics.json`` and the card into a folder and return the two paths.

    Args:
        sae: the SAE.
        folder: an existing folder.
        facts: about the SAE.
        existing_card: a README whose hand-written parts are kept.
        repo_id: repository that the card is for.
        subfolder: folder of the SAE in that repository.
    """
    made = model_card(sae, facts, repo_id=repo_id, subfolder=subfolder)
    card = merge(existing_card, made, "card", generated=("model-index", "model_name"))
    path = folder / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return [write_facts(facts, folder), path]
