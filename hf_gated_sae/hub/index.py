"""What is known of published SAEs beside what their repositories say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def known_facts(repo_id: str, address: str) -> Mapping[str, Any]:
    """Return facts about an SAE that its own files do not hold.

    Args:
        repo_id: repository on the Hub.
        address: folder or file of the SAE inside it.

    Returns:
        Facts by name, empty for an unknown SAE: ``base_model`` (repository id), ``input_scale`` (the constant that
        activations were multiplied by in training), ``normalization`` (as in `SAEConfig`), ``neuronpedia``.
    """
    return {}
