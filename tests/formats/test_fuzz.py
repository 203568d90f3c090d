"""Damaged checkpoints of every format: our own error, or finite weights of the right shape; nothing else.

``HF_GATED_SAE_FUZZ_CASES=1500 HF_GATED_SAE_FUZZ_SEED=7 pytest tests/formats/test_fuzz.py`` (``make fuzz``) runs more
cases; see `tests.formats.fuzzing` for the rules, and to repeat one format alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from hf_gated_sae.formats import formats
from tests.support.hostile import CANARY

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("HF_GATED_SAE_FUZZ_CASES", "150"))
SEED = int(os.environ.get("HF_GATED_SAE_FUZZ_SEED", "0"))
MEGABYTES = 500
"""Allowed growth of peak memory since before the first case."""
SLOWEST = 4.0


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Return the outcomes of the cases of every format, run in a separate process."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.formats.fuzzing",
        "--cases",
        str(CASES),
        "--seed",
        str(SEED),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr)  # noqa: T201  # shown with a failure, and by -s: how many cases, and the seed
    return json.loads(done.stdout)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(formats))
def test_damage_is_refused_or_harmless(name: str, report: dict[str, Any]) -> None:
    found = report[name]
    assert not found["failures"], f"{len(found['failures'])} of {found['cases']}:\n" + "\n".join(
        found["failures"][:10]
    )
    assert found["cases"] == CASES == found["loaded"] + found["refused"]
    assert found["loaded"] and found["refused"] > CASES / 20, "the damage proves nothing"
    assert found["slowest"] < SLOWEST


@pytest.mark.timeout(3600)
def test_memory_stays_bounded(report: dict[str, Any]) -> None:
    peaks = [found["peak_mb"] for name, found in report.items() if name != "before_mb"]
    assert max(peaks) - report["before_mb"] < MEGABYTES


@pytest.mark.timeout(3600)
def test_no_code_was_run(report: dict[str, Any]) -> None:
    assert not CANARY.exists()
