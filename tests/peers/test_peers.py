"""An SAE that is loaded from an owner's checkpoint computes the same as the owner's library."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_gated_sae import SAEModel

WRITTEN = Path(os.environ["SAE_PEERS"])
TOLERANCE = 1e-5
CASES = sorted(path.parent for path in WRITTEN.glob("*/*/expected.npz"))
OWNERS = {"dictionary_learning", "saelens", "sparsify"}


def test_every_owner_wrote_something() -> None:
    assert {case.parent.name for case in CASES} == OWNERS


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_the_owners_library_gives_the_same(case: Path) -> None:
    about = json.loads((case / "about.json").read_text())
    expected = {name: torch.from_numpy(value) for name, value in np.load(case / "expected.npz").items()}
    sae = SAEModel.from_pretrained(case / "repository", about["address"])
    assert sae.checkpoint is not None and sae.checkpoint.format == case.parent.name
    with torch.no_grad():
        got = sae(expected["x"])
    for name, value in (("latents", got.latents), ("output", got.reconstruction)):
        wanted = expected[name]
        assert value.shape == wanted.shape, name
        assert torch.count_nonzero(wanted) > 0, f"{name} are all zero, which proves nothing"
        error = (value.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < TOLERANCE, f"{name} are {error:.1e} off"
    for field, wanted in about["config"].items():
        assert getattr(sae.config, field) == wanted, field
