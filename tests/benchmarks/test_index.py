"""Time to load the index of known SAEs in a fresh process."""

import statistics
import subprocess
import sys

import pytest

from tests.benchmarks.measure import show

LIMIT = 0.020  # seconds
FRESH = (
    "import time\n"
    "from hf_gated_sae.hub.index import releases\n"
    "start = time.perf_counter()\n"
    "assert len(releases()) >= 170\n"
    "print(time.perf_counter() - start)"
)


@pytest.mark.benchmark
def test_the_index_loads_fast():
    runs = [
        subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True) for _ in range(20)
    ]
    median = statistics.median(float(run.stdout) for run in runs)
    show("seconds, median of 20 fresh processes", [("loading the index", median, LIMIT)])
    assert median <= LIMIT
