"""The tested ranges of versions of other libraries, and the check that the installed ones are within them."""

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
"""The same ranges as in ``pyproject.toml``; `make test-matrix` runs the suite at both ends of each."""


def require_supported(*libraries: str) -> None:
    """Raise unless the installed versions of libraries are in their ranges.

    A newer major version may rename attributes on which hooks depend. That does not always raise an error: an edit
    could silently apply to no token, or to the wrong ones.

    Args:
        libraries: names among `SUPPORTED`; those that are not installed are skipped.

    Raises:
        VersionError: naming the first library outside its range.
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
                f"pip install '{library}{accepted}', or install a version of hf-gated-sae that supports it."
            )
