"""Processes that run one library each on request, every library in its own environment, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("HF_GATED_SAE_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
"""The interpreter of the peers' environment, which `make test-peers` makes."""
ROUNDS = int(os.environ.get("HF_GATED_SAE_BENCHMARK_ROUNDS", "7"))


class Worker:
    """A process of `script WHAT FOLDER` that answers each line with one line of JSON after `RESULT`.

    Args:
        script: what to run.
        what: implementation; names with prefix "ours" or "torch" run in this environment, others in the peers'.
        folder: where its weights are.
    """

    def __init__(self, script: Path, what: str, folder: Path) -> None:
        is_peer = not what.startswith(("ours", "torch"))
        if is_peer and not PEERS.exists():
            pytest.skip("no peers' environment: run `make test-peers` once")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "" if is_peer else str(ROOT)}
        command = [str(PEERS) if is_peer else sys.executable, str(script), what, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Send a line and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return answer
        raise AssertionError(f"ended with {self.process.wait()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
