"""Shared fixtures. The loopback Hub comes first: huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

from tests.support.loopback import HUB  # isort: skip

import gc
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.mini_hub import MiniHub

torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much where the machine is shared


def pytest_collection_finish() -> None:
    """Exempt what is alive by now from garbage collection, of which `Trainer.train` runs a full one every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Make every test independent of those before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[MiniHub]:
    """The loopback Hub of the session, without leftover faults or recorded requests."""
    HUB.faults.clear()
    HUB.requests.clear()
    yield HUB
    HUB.faults.clear()


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository name in the user's own namespace that no other test uses; nothing is created."""
    return "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-")[:80]


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    """An empty Hub cache."""
    return str(tmp_path / "cache")
