"""Ctrl-C at any time: one sentence, exit status 130, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.foreign import example_files

pytestmark = pytest.mark.slow

MAIN = "from hf_gated_sae.cli import main\nmain()\n"
# Waits when the weights are in the staging folder and have not been moved to their destination.
SLOW = """
import sys, time
from hf_gated_sae.modeling import SAEModel

save = SAEModel.save_pretrained
def slow(self, *args, **kwargs):
    save(self, *args, **kwargs)
    print("saved aside", file=sys.stderr, flush=True)
    time.sleep(100)
SAEModel.save_pretrained = slow
"""


def interrupted(
    words: list[str], ready: Callable[[str, int], bool], tmp_path: Path, code: str = MAIN
) -> tuple[int, str, str]:
    """Run a command, send Ctrl-C when `ready(stderr, pid)` is true, and return its status, stdout and stderr."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    errors = tmp_path / "stderr"
    environment = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            # Background processes of a shell ignore Ctrl-C, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 800
        while not ready(errors.read_text(), process.pid):
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=800)
    left = [path for path in temporary.rglob("*") if "hf-gated-sae" in path.name or "saving" in path.name]
    assert not left, left
    return process.returncode, output, errors.read_text()


def said(text: str) -> Callable[[str, int], bool]:
    return lambda errors, process: text in errors


@pytest.mark.parametrize("moment", ["3/7 splice", "4/7 find the latent"])
def test_the_demo(tmp_path, moment):
    out = tmp_path / "out"
    status, output, errors = interrupted(["demo", "--out", str(out)], said(moment), tmp_path)
    assert status == 130 and output == "" and not out.exists()
    last = errors.splitlines()[-1]
    assert last.startswith(f"Interrupted. Nothing was published to {out};") and "--tokens" in last
    assert "Traceback" not in errors


def test_the_demo_while_it_publishes(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    words = ["demo", "--out", str(out), "--tokens", "1024", "--latent", "484", "--strength", "2"]
    status, _, errors = interrupted(words, said("saved aside"), tmp_path, SLOW + MAIN)
    assert status == 130 and "Nothing was published" in errors
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_the_demo_without_out_leaves_no_temporary_folder(tmp_path):
    status, _, errors = interrupted(["demo"], said("3/7 splice"), tmp_path)
    assert status == 130 and "Interrupted. Nothing was published;" in errors


def test_convert(tmp_path):
    example_files("gemma_scope", tmp_path)
    source, out = tmp_path / "google" / "gemma-scope-2b-pt-res", tmp_path / "ours"
    words = ["convert", str(source), "layer_1/width_16k/average_l0_71", "--out", str(out)]
    status, output, errors = interrupted(words, said("saved aside"), tmp_path, SLOW + MAIN)
    assert status == 130 and output == "" and not out.exists()
    assert f"Interrupted. Nothing was written to {out}; the same command starts again" in errors


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what a process has loaded")
@pytest.mark.parametrize("words", [["search", "-m", "gpt2", "--no-live"], ["info", "nobody/nothing"], ["demo"]])
def test_while_torch_is_imported(words, tmp_path):
    def importing(errors: str, process: int) -> bool:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()

    status, output, errors = interrupted(words, importing, tmp_path)
    assert status == 130 and output == ""
    assert errors.startswith("Interrupted.") and errors.count("\n") == 1
