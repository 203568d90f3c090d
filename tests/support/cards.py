"""Checking that the Hub accepts a model card."""

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import get_session, hf_raise_for_status
from packaging.version import Version

from .loopback import HUB


def require_valid(card: ModelCard) -> None:
    """Raise unless the loopback Hub accepts a card; huggingface_hub before 2 would ask the public Hub."""
    if Version(huggingface_hub.__version__) >= Version("2"):
        card.validate()
        return
    asked = {"repoType": "model", "content": str(card)}
    hf_raise_for_status(
        get_session().post(f"{HUB.url}/api/validate-yaml", json=asked, headers={"Accept": "text/plain"})
    )
