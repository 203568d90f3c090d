"""Run by `make test-peers` only, which installs the owners' libraries in a separate environment.

The scripts in `owners/` run there. Each writes checkpoints with its library, and beside them an input and the
library's results for it; the tests here load the checkpoints and compare.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

WRITTEN = os.environ.get("SAE_PEERS")
"""Folder that the scripts wrote to."""

collect_ignore_glob = ["owners/*"] if WRITTEN else ["owners/*", "test_*.py"]


def pytest_report_header() -> list[str]:
    """Name the libraries that wrote the checkpoints."""
    files = sorted(Path(WRITTEN).glob("*/versions.json")) if WRITTEN else []
    return [f"written by {json.loads(file.read_text())}" for file in files]
