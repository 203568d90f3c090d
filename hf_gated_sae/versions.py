"""Which versions of other libraries this one is tested with, from the oldest to the newest that it accepts."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .errors import VersionError

SUPPORTED = {
    "torch": ">=2.9,<3",
    "transformers": ">=5.16,<6",
    "huggingface-hub": ">=1.31,<3",
    "accelerate": ">=1.14,<2",
    "nnsight": ">=0.8,<0.9",
    "peft": ">=0.19,<0.22",
}
"""The ranges that ``pyproject.toml`` states, too; `make test-matrix` runs the suite at both ends of each."""


def require_supported(*libraries: str) -> None:
    """Raise unless the installed versions of libraries are in their ranges.

    A newer major version may have renamed what hooks depend on, and what was renamed does not always raise: an edit
    would silently reach no token, or others.

    Args:
        libraries: names among `SUPPORTED`; those that are not installed are passed over.

    Raises:
        VersionError: naming the first that is not in its range.
    """
    for library in libraries:
        try:
            installed = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
        accepted = SpecifierSet(SUPPORTED[library])
        if not accepted.contains(Version(installed), prereleases=True):
            raise VersionError(
                f"{library} {installed} is installed, and hf-gated-sae is tested with {library}{accepted}: run "
                f"pip install '{library}{accepted}', or install the version of hf-gated-sae that knows it."
            )
