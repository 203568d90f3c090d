"""The model and the SAEs that ship with the package, created by `hub_scripts/make_demo_assets.py`."""

from __future__ import annotations

from pathlib import Path

from ..errors import MissingFileError

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "lm"
SAES = ASSETS / "saes"
DEFAULT_SAE = "resid_post.1/gated"


def require_bundled() -> None:
    """Raise unless the bundled model and SAEs are installed.

    Raises:
        MissingFileError: with how to install or rebuild them.
    """
    for folder in (MODEL, SAES / DEFAULT_SAE):
        if not (folder / "config.json").is_file():
            raise MissingFileError(
                f"The bundled demo has no {folder.relative_to(ASSETS)}: reinstall hf-gated-sae, or rebuild it with "
                "hub_scripts/make_demo_assets.py."
            )
