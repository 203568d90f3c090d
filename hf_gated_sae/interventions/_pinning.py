"""What a plan pins of its SAEs: weights that are those of the checkpoint, and files that are still the same."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError, MissingFileError, shown
from ..hub.origin import Origin
from ..modeling import SAEModel
from ..storage.atomic_write import FACTS_FILE

HIGHEST = 2
"""How many folders a relative path climbs at most; what lies further away is named by its absolute path."""

_ANNOTATIONS = {"base_model", "base_model_revision"}  # which change nothing that an SAE computes
_HASH = re.compile(r"[0-9a-f]{64}")
_ELSEWHERE = "hf://"


def require_unchanged(sae: SAEModel, again: SAEModel) -> None:
    """Raise unless an SAE is what its checkpoint gives: the weights to the bit, but for a cast, and the configuration.

    Args:
        sae: the SAE in memory, on any device.
        again: the same, just loaded in the SAE's dtype.

    Raises:
        InputError: naming what differs.
    """
    held, stored = sae.state_dict(), again.state_dict()
    changed = [name for name in stored if name not in held or not _same(held[name], stored[name])]
    changed += sorted(set(held) - set(stored))
    changed += [
        f"config.{name}"
        for name in type(sae.config).own_fields()
        if name not in _ANNOTATIONS and getattr(sae.config, name) != getattr(again.config, name, None)
    ]
    if changed:
        names = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
        raise InputError(
            f"The {type(sae).__name__} in memory is not the one at {sae.checkpoint}, which the plan would name: they "
            f"differ in {names}. Save this one with save_pretrained or push_to_hub, load it from there with "
            "SAEModel.from_pretrained, and build the plan with that."
        )


def _same(held: Tensor, stored: Tensor) -> bool:
    if held.is_meta or held.shape != stored.shape:
        return False
    return torch.equal(stored.to(held.dtype), held.detach().to(stored.device))


def hashes(origin: Origin) -> dict[str, str]:
    """Return the sha256 of each file that a local SAE is read from; what was measured on it is none of them.

    It reads every file once: about a second per GB.

    Raises:
        MissingFileError: if a file is gone.
    """
    names = [name for name in origin.files if name != FACTS_FILE]
    found = {name: _file(origin, name) for name in names}
    return {name: _sha256(path) for name, path in found.items() if path is not None}


def require_same_files(origin: Origin, pinned: Mapping[str, str]) -> None:
    """Raise unless the files that an SAE is read from are those of a plan.

    Args:
        origin: where the SAE was read from.
        pinned: what `hashes` gave when the plan was written.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    found = hashes(origin)
    differing = sorted(name for name in {*found, *pinned} if found.get(name) != pinned.get(name))
    if differing:
        name = differing[0]
        was, now = (f"sha256 {each[name][:12]}..." if name in each else "no such file" for each in (pinned, found))
        raise CheckpointError(
            f"The SAE at {origin} is not the one that the plan was saved with: of {name} the plan pins {was}, and "
            f"what is read there now has {now}. Put the pinned files back, or build the plan anew with the SAE that "
            "is there now, and save that."
        )


def _file(origin: Origin, name: str) -> Path | None:
    """Return a file that an SAE in a folder is read from; None for one on the Hub, which is pinned by its commit."""
    root = Path(origin.repo).expanduser()
    if not name.startswith(_ELSEWHERE):
        # An SAE may be one file of a folder, or one layer of what a folder holds, under a name that is no folder's.
        place = root / origin.subfolder
        above = [place, *(each for each in place.parents if each.is_relative_to(root))]
        return next((each / name for each in above if (each / name).is_file()), place / name)
    owner, repo, path = name.removeprefix(_ELSEWHERE).split("/", 2)
    return None if "@" in repo else root.absolute().parent.parent / owner / repo / path


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise MissingFileError(f"{path} cannot be read ({error.strerror}), and a plan needs its hash.") from error
    return digest.hexdigest()


def checked_hashes(content: Any) -> dict[str, str]:
    """Return what a plan says of an SAE's files.

    Raises:
        InputError: unless it is sha256 by name.
    """
    is_mapping = isinstance(content, dict) and all(map(_is_hash, content.values()))
    if not is_mapping:
        raise InputError(f"files of an SAE of the plan is {shown(content)}; expected the sha256 of each file by name.")
    return dict(content)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def written_path(repo: str, folder: Path | None) -> str:
    """Return how a plan names a local folder.

    Args:
        repo: the folder.
        folder: where the plan will lie; None if that is not known.

    Returns:
        The path from there, with ``/``, if it climbs at most two folders; else the absolute one.
    """
    path = Path(repo).expanduser().absolute()
    if folder is None:
        return str(path)
    try:
        relative = Path(os.path.relpath(path.resolve(), folder.resolve()))
    except ValueError:  # on another drive
        return str(path)
    return str(path) if relative.parts.count("..") > HIGHEST else relative.as_posix()


def read_path(repo: str, folder: Path | None) -> str:
    """Return the local folder that a plan names.

    Args:
        repo: what `written_path` gave.
        folder: where the plan lies; None for the current folder.

    Raises:
        MissingFileError: if it is not there.
    """
    start = (Path() if folder is None else folder).resolve()
    path = Path(repo) if Path(repo).is_absolute() else Path(os.path.normpath(start / PurePosixPath(repo)))
    if not path.is_dir():
        raise MissingFileError(
            f"The plan names an SAE in the folder {shown(repo, 300)}, seen from {start}, and there is no such folder: "
            "put the SAE there, or correct 'repo' in the plan."
        )
    return str(path)
