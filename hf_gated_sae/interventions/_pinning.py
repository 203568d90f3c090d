"""Pin the SAEs of a plan: check that weights are those of the checkpoint, and that files are unchanged."""

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
"""Most ``..`` in a relative path to an SAE; SAEs further away are named by their absolute path."""

_ANNOTATIONS = {"base_model", "base_model_revision"}  # they do not affect what an SAE computes
_HASH = re.compile(r"[0-9a-f]{64}")
_HUB_URI = "hf://"


def require_unchanged(sae: SAEModel, reloaded: SAEModel) -> None:
    """Raise unless an SAE has the weights, bit for bit after a cast, and the configuration of its checkpoint.

    Args:
        sae: the SAE in memory, on any device.
        reloaded: the same SAE, just loaded in the SAE's dtype.

    Raises:
        InputError: naming what differs.
    """
    held, stored = sae.state_dict(), reloaded.state_dict()
    changed = [name for name in stored if name not in held or not _same(held[name], stored[name])]
    changed += sorted(set(held) - set(stored))
    changed += [
        f"config.{name}"
        for name in type(sae.config).own_fields()
        if name not in _ANNOTATIONS and getattr(sae.config, name) != getattr(reloaded.config, name, None)
    ]
    if changed:
        names = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
        raise InputError(
            f"The {type(sae).__name__} in memory is not the one at {sae.checkpoint}, to which the plan would refer: "
            f"they differ in {names}. Save this one with save_pretrained or push_to_hub, load it from there with "
            "SAEModel.from_pretrained, and build the plan with that."
        )


def _same(held: Tensor, stored: Tensor) -> bool:
    if held.is_meta or held.shape != stored.shape:
        return False
    return torch.equal(stored.to(held.dtype), held.detach().to(stored.device))


def hashes(origin: Origin) -> dict[str, str]:
    """Return the sha256 of each file of a local SAE, without the file of measurements.

    Every file is read once, which takes about a second per GB.

    Raises:
        MissingFileError: if a file no longer exists.
    """
    names = [name for name in origin.files if name != FACTS_FILE]
    found = {name: _local_path(origin, name) for name in names}
    return {name: _sha256(path) for name, path in found.items() if path is not None}


def require_same_files(origin: Origin, pinned: Mapping[str, str]) -> None:
    """Raise unless the files of an SAE have the hashes in a plan.

    Args:
        origin: where the SAE was loaded from.
        pinned: the result of `hashes` when the plan was written.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    found = hashes(origin)
    differing = sorted(name for name in {*found, *pinned} if found.get(name) != pinned.get(name))
    if differing:
        name = differing[0]
        was, now = (f"sha256 {each[name][:12]}..." if name in each else "no such file" for each in (pinned, found))
        raise CheckpointError(
            f"The SAE at {origin} is not the one that the plan was saved with: for {name} the plan pins {was}, "
            f"and the file there now has {now}. Restore the pinned files, or build and save a new plan with the SAE "
            "that is there now."
        )


def _local_path(origin: Origin, name: str) -> Path | None:
    """Return the path of a file of a local SAE; None for a file on the Hub, which is pinned by its commit."""
    root = Path(origin.repo).expanduser()
    if not name.startswith(_HUB_URI):
        # The address may be a file of a folder, or one layer of a folder's SAE; then the files are in a folder above.
        address = root / origin.subfolder
        above = [address, *(each for each in address.parents if each.is_relative_to(root))]
        return next((each / name for each in above if (each / name).is_file()), address / name)
    owner, repo, path = name.removeprefix(_HUB_URI).split("/", 2)
    return None if "@" in repo else root.absolute().parent.parent / owner / repo / path


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise MissingFileError(
            f"{path} cannot be read ({error.strerror}), and a plan needs its hash: restore the file."
        ) from error
    return digest.hexdigest()


def checked_hashes(content: Any) -> dict[str, str]:
    """Return the hashes of an SAE's files in a plan.

    Raises:
        InputError: unless they are sha256 by file name.
    """
    is_mapping = isinstance(content, dict) and all(map(_is_hash, content.values()))
    if not is_mapping:
        raise InputError(f"files of an SAE of the plan is {shown(content)}; expected the sha256 of each file by name.")
    return dict(content)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def written_path(repo: str, folder: Path | None) -> str:
    """Return the path by which a plan refers to a local folder.

    Args:
        repo: the folder.
        folder: folder of the plan; None if that is not known.

    Returns:
        The relative path from there, with ``/``, if it has at most two ``..``; else the absolute one.
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
    """Return the local folder to which a plan refers.

    Args:
        repo: a path that `written_path` returned.
        folder: folder of the plan; None for the current folder.

    Raises:
        MissingFileError: if it does not exist.
    """
    start = (Path() if folder is None else folder).resolve()
    path = Path(repo) if Path(repo).is_absolute() else Path(os.path.normpath(start / PurePosixPath(repo)))
    if not path.is_dir():
        raise MissingFileError(
            f"The plan names an SAE in the folder {shown(repo, 300)}, relative to {start}, and there is no such "
            "folder: put the SAE there, or correct 'repo' in the plan."
        )
    return str(path)
