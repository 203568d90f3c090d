"""Checkpoint folders: they appear whole or not at all, and a manifest of hashes shows whether they are still whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, MissingFileError, reason
from .processes import Processes

MANIFEST = "manifest.json"
"""Lists name, size and sha256 of every other file of a checkpoint."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished"

_log = logging.getLogger(__name__)


def unfinished(target: Path) -> Path:
    """Return the folder, on the same disk, in which a checkpoint is written; the same in every process."""
    return target.parent / _UNFINISHED / target.name


@contextmanager
def writing(target: Path, everyone: Processes) -> Iterator[None]:
    """Convert errors of a full or read-only disk into one error that all processes raise.

    Files already written are removed, now or when the next run begins.

    Args:
        target: the checkpoint that is being written into ``unfinished(target)``.
        everyone: the processes that write it; the code inside must not wait for a process that has failed.

    Raises:
        CheckpointError: naming the last whole checkpoint.
    """

    def explained(error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {target} could not be written ({reason(error)}) and does not exist: free disk space and "
            f"resume. {advice(target.parent)}"
        )

    try:
        with everyone.raising_together(explained):
            yield
    except BaseException:
        if everyone.rank == 0:
            remove_unfinished(target.parent)
        raise


def begin(target: Path) -> None:
    """Create an empty folder to write a checkpoint into."""
    remove_unfinished(target.parent)
    unfinished(target).mkdir(parents=True)


def complete(target: Path, everyone: Processes | None = None) -> None:
    """Move the checkpoint in ``unfinished(target)`` to its name, once all of it has reached the disk.

    Args:
        target: the checkpoint; an older one of that name is replaced.
        everyone: the processes that wrote it; all of them call this, and each reads a part. One by default.

    Raises:
        CheckpointError: if the disk is full.
    """
    staging, everyone = unfinished(target), everyone or Processes()
    own = {}
    with writing(target, everyone):
        for name in everyone.own_share(_files(staging)):
            own[name] = _fingerprint(staging / name)
            _sync_to_disk(staging / name)
    manifest = everyone.merged(own)
    with writing(target, everyone):
        if everyone.rank == 0:
            text = json.dumps({"files": dict(sorted(manifest.items()))}, indent=2) + "\n"
            (staging / MANIFEST).write_text(text, encoding="utf-8")
            for path in (staging / MANIFEST, *(each for each in staging.rglob("*") if each.is_dir()), staging):
                _sync_to_disk(path)
            if target.exists():
                target.replace(staging.with_name(f"replaced-{target.name}"))
            staging.replace(target)
            remove_unfinished(target.parent)
            _sync_to_disk(target.parent)


def remove_unfinished(run: Path) -> None:
    """Remove the unfinished checkpoints of a killed process from a run's folder."""
    shutil.rmtree(run / _UNFINISHED, ignore_errors=True)


def verify(checkpoint: Path, everyone: Processes | None = None) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Args:
        checkpoint: the folder.
        everyone: the processes that all call this and each read a part of it; one by default.

    Raises:
        MissingFileError: if there is no such folder.
        CheckpointError: naming the first file that is missing or changed, and a checkpoint that is whole.
    """
    if problem := _problem(checkpoint, everyone):
        error = CheckpointError if checkpoint.is_dir() else MissingFileError
        raise error(f"{checkpoint} {problem}. {advice(checkpoint.parent, but=checkpoint)}")


def newest_whole(run: Path, everyone: Processes | None = None) -> Path | None:
    """Return the whole checkpoint of a run with the most steps; None if there is none.

    Args:
        run: the run's ``output_dir``.
        everyone: the processes that all call this and each read a part of it; one by default.
    """
    for checkpoint in checkpoints(run):
        problem = _problem(checkpoint, everyone)
        if problem is None:
            return checkpoint
        _log.warning("%s %s and is skipped.", checkpoint, problem)
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run that are named like checkpoints, the one with the most steps first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def rotate(newest: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints of a run; only those that an `SAETrainer` wrote are counted and removed.

    Args:
        newest: the checkpoint written last; those with more steps belong to another run and stay.
        limit: number of checkpoints to keep; None for all.
    """
    if not limit or limit < 0:
        return
    own = [path for path in checkpoints(newest.parent) if not lacks_manifest(path)]
    for path in own[own.index(newest) + limit :]:
        shutil.rmtree(path, ignore_errors=True)


def lacks_manifest(checkpoint: Path) -> bool:
    """Whether a folder named like a checkpoint was not written by an `SAETrainer`."""
    return not (checkpoint / MANIFEST).is_file()


def advice(run: Path, but: Path | None = None) -> str:
    """Return the sentence that says from where to resume.

    Args:
        run: the run's ``output_dir``.
        but: a checkpoint that is known to be broken.
    """
    for checkpoint in checkpoints(run):
        if checkpoint != but and _problem(checkpoint) is None:
            return (
                f"The newest whole checkpoint is {checkpoint}: pass it as resume_from_checkpoint, or --resume on the "
                "command line."
            )
    return f"There is no {'other ' if but else ''}whole checkpoint in {run}."


def _problem(checkpoint: Path, everyone: Processes | None = None) -> str | None:
    """Return what is wrong with a checkpoint, as the rest of a sentence; None if it is whole.

    Args:
        checkpoint: the folder.
        everyone: the processes that all call this and each read a part of it; one by default.
    """
    everyone = everyone or Processes()
    return everyone.first_text(_problem_with_own(checkpoint, everyone))


def _problem_with_own(checkpoint: Path, everyone: Processes) -> str | None:
    """Return what is wrong with the files of a checkpoint that this process reads."""
    if not checkpoint.is_dir():
        return "is not a folder"
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in everyone.own_share(list(files)):
            path, expected = checkpoint / name, files[name]
            if not path.is_file():
                return f"is broken: {name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"is broken: {name} has {path.stat().st_size} bytes, expected {expected['size']}"
            if _fingerprint(path) != expected:
                return f"is broken: the content of {name} has changed since it was written"
    except FileNotFoundError:
        return f"has no {MANIFEST}, as every checkpoint of an SAETrainer does"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is broken: {MANIFEST} cannot be read ({error})"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and does not need to
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
