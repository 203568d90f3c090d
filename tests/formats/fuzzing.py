"""Load damaged checkpoints of every format and report the outcomes as JSON; run as a program, in its own process.

    python -m tests.formats.fuzzing --cases 1000 --seed 0 [--format gemma_scope ...]

An SAE that loads must be finite and of the announced shape; otherwise one of our own errors must be raised. Nothing
else may happen: no other exception, no code run, no file written, no long wait.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_gated_sae import SAEModel
from hf_gated_sae.errors import SAEError
from hf_gated_sae.formats import Example, formats
from tests.support.hostile import CANARY
from tests.support.mutations import files_of, mutate

SLOW = 4.0
"""Seconds of processor time that one case may take; the machine may be shared."""
LONGEST_MESSAGE = 2500


class TooSlow(BaseException):
    """A case took too long."""


def checked(sae: Any) -> None:
    """Raise unless every tensor is finite and the shapes are those of the configuration."""
    for name, tensor in sae.state_dict().items():
        assert torch.isfinite(tensor.double()).all(), f"{name} is not finite"
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in type(sae)(sae.config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in sae.state_dict().items()} == expected, "shapes"
    if sae.config.kept_latents is None:
        latents = sae.encode(torch.randn(3, *sae.input_shape, dtype=sae.dtype))
        assert (latents.shape[0], latents.shape[-1]) == (3, sae.config.d_sae), "latents"


def attempt(repo: Path, address: str, latents: list[int] | None) -> str:
    """Load one SAE and return ``"loaded"``, ``"refused"``, or a description of what else happened."""
    start = time.process_time()
    try:
        checked(SAEModel.from_pretrained(repo, address, **({"latents": latents} if latents else {})))
        result = "loaded"
    except SAEError as error:
        result = "refused" if len(str(error)) < LONGEST_MESSAGE else f"message of {len(str(error))} characters"
    except TooSlow:
        return "does not end"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "hf_gated_sae" in f.filename]
        place = ours[-1] if ours else frame
        result = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    seconds = time.process_time() - start
    return result if seconds < SLOW else f"took {seconds:.1f} s"


@contextlib.contextmanager
def changed(repo: Path, sound: dict[str, bytes], files: dict[str, bytes | None]) -> Iterator[None]:
    """Write the damaged files, and restore the sound ones afterwards."""
    for name, content in files.items():
        (repo / name).unlink(missing_ok=True)
        if content is not None:
            (repo / name).write_bytes(content)
    try:
        yield
    finally:
        for name in files:
            (repo / name).unlink(missing_ok=True)
            if name in sound:
                (repo / name).write_bytes(sound[name])


def relevant(files: dict[str, bytes], address: str) -> dict[str, bytes]:
    """Return the files in an SAE's folder and those above it."""
    parts = address.split("/")
    above = {"/".join(parts[:n]) for n in range(len(parts))} | {""}
    near = {name: data for name, data in files.items() if name.startswith(f"{address}/") or name == address}
    return near | {name: data for name, data in files.items() if name.rpartition("/")[0] in above}


def fuzz(name: str, root: Path, cases: int, seed: int) -> dict[str, Any]:
    """Damage the examples of one format in turn."""
    examples: list[Example] = formats[name].examples(root)
    trees = {example.repo: files_of(root / example.repo) for example in examples}
    dice = random.Random(f"{seed} {name}")
    found: dict[str, Any] = {"cases": 0, "loaded": 0, "refused": 0, "failures": []}
    start, slowest = time.process_time(), 0.0
    for number in range(cases):
        example = examples[number % len(examples)]
        repo, sound = root / example.repo, trees[example.repo]
        files, what = mutate(relevant(sound, example.address), dice)
        latents = dice.choice([None, None, None, [1, 0]])
        faulthandler.dump_traceback_later(60, exit=True)  # for code that no signal interrupts
        signal.alarm(20)
        began = time.process_time()
        with changed(repo, sound, files):
            before = sorted(root.rglob("*"))
            try:
                result = attempt(repo, example.address, latents)
            finally:
                signal.alarm(0)
            if sorted(root.rglob("*")) != before:
                result = "wrote files"
        if CANARY.exists():
            result = "ran code"
            CANARY.unlink()
        slowest = max(slowest, time.process_time() - began)
        found["cases"] += 1
        if result in ("loaded", "refused"):
            found[result] += 1
        else:
            place = f"{example.repo}/{example.address}"
            found["failures"].append(f"[seed {seed}, case {number}, {place}] {what}: {result}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return {**found, "seconds": time.process_time() - start, "slowest": slowest, "peak_mb": peak}


def _too_slow(*_: object) -> None:
    raise TooSlow


def main() -> None:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", dest="names")
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_slow)
    CANARY.unlink(missing_ok=True)
    report: dict[str, Any] = {}
    for name in given.names or list(formats):
        folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
        try:
            if not report:  # late imports are not counted as growth
                example = formats["gemma_scope"].examples(folder / "first")[0]
                SAEModel.from_pretrained(folder / "first" / example.repo, example.address)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
                report["before_mb"] = peak
            try:
                report[name] = fuzz(name, folder / "repos", given.cases, given.seed)
            except Exception:
                report[name] = {"cases": 0, "failures": [traceback.format_exc()[-600:]]}
            if not sys.stderr.closed:
                counts = {key: value for key, value in report[name].items() if key != "failures"}
                sys.stderr.write(f"{name}: {counts}, {len(report[name]['failures'])} failures\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
