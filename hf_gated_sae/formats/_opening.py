"""Find and open the SAE at a repository id (or folder) and subfolder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, MissingFileError, SAEError, did_you_mean
from ..hub.index import releases, resolve_alias
from ..hub.location import LocalFolder, Location, clean_subfolder, locate
from ..hub.neuronpedia import sae_of_dashboards, unknown_dashboards
from ..modeling.checkpoint import Checkpoint
from ..modeling.description import HOME_MADE, CheckpointDescription
from ..storage import TENSOR_FILES
from ._claims import claims_of, is_claimed, requested_layout
from ._home_made import open_home_made
from ._home_made_advice import NEAREST, advice
from .base import formats

SHOWN_FOLDERS = 20


PLACE = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def open_checkpoint(
    repo: str,
    subfolder: str = "",
    *,
    variant: str | None = None,
    format: str | None = None,
    description: CheckpointDescription | None = None,
    **arguments: Any,
) -> Checkpoint:
    """Pin and list a repository, and open an SAE with the one format that claims its folder.

    Args:
        repo: folder, repository id, or ``repository@revision``; a local folder wins.
        subfolder: folder (or file) of the SAE inside it.
        variant: which of several sets of weights.
        format: name of the layout, where several claim the folder.
        description: the user's description of a home-made checkpoint.
        **arguments: those of `locate_sae`; other arguments of `from_pretrained` are ignored.

    Returns:
        The checkpoint, described by its headers.

    Raises:
        CheckpointError: if no format, or more than one, claims the folder.
        MissingFileError: if there is no such folder, repository, revision or file.
    """
    where = {name: arguments[name] for name in PLACE if name in arguments}
    return open_at(locate_sae(repo, subfolder, **where), variant=variant, format=format, description=description)


def locate_sae(
    repo: str,
    subfolder: str = "",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Location:
    """Pin a repository and list it.

    `repo` may also be a release of the index, such as ``"gemma-scope-2b-pt-res-canonical"``, and `subfolder` an id in
    it: SAELens's ``release`` and ``sae_id``. Without a `subfolder`, `repo` may be a dashboard name on Neuronpedia (see
    `sae_of_dashboards`). A local folder of that name, and a folder or file of the repository, win.

    Args:
        repo: folder, tensor file, repository id, or ``repository@revision``.
        subfolder: folder (or file) inside it.
        revision: branch, tag, ``refs/pr/1`` or commit.
        token: access token; None uses the stored one, False none.
        cache_dir: folder of the Hub cache.
        local_files_only: use only cached files; also implied by ``HF_HUB_OFFLINE=1``.
        force_download: download files even if they are cached.

    Returns:
        The folder (or file) `subfolder`.

    Raises:
        InputError: if several SAEs have a name, or a subfolder is given with the name of one SAE.
        MissingFileError: if there is no such folder, repository or revision.
    """
    repo, subfolder = _repository(os.fspath(repo), clean_subfolder(subfolder or ""))
    alone = Path(repo).expanduser()
    if not subfolder and alone.suffix in TENSOR_FILES and alone.is_file():
        beside = [path.name for path in alone.parent.iterdir() if path.is_file()]
        return LocalFolder(str(alone.parent), all_files=beside).at(alone.name)
    try:
        root = locate(
            repo,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except MissingFileError as error:
        if "/" not in repo and (close := did_you_mean(repo, releases())):
            raise MissingFileError(f"{error}{close}") from error
        if unknown := unknown_dashboards(repo):
            raise MissingFileError(f"{error} {unknown}") from error
        raise
    location = root.at(subfolder)
    if not _exists(location):
        known = root.at(resolve_alias(root.repo_id, subfolder)[1])
        if not _exists(known):
            raise _no_such_folder(root, location)
        location = known
    return location


def _exists(location: Location) -> bool:
    """Whether a location has files, or a file above points from it to files elsewhere."""
    return bool(location.files) or is_claimed(location)


def _repository(repo: str, subfolder: str) -> tuple[str, str]:
    """Return the repository (perhaps with a revision) and address of a release and an id, or of a dashboard name."""
    name, at, revision = repo.partition("@")
    if Path(repo).expanduser().exists():
        return repo, subfolder
    if name in releases():
        found, address = resolve_alias(name, subfolder)
        return f"{found}{at}{revision}", address
    sae = sae_of_dashboards(name)
    if sae is None:
        return repo, subfolder
    if subfolder:
        raise InputError(
            f"Given {name!r}, the Neuronpedia name of one SAE, and subfolder {subfolder!r}: omit the subfolder."
        )
    return f"{sae.repo}{at}{revision}", sae.address


def open_at(
    location: Location,
    *,
    variant: str | None = None,
    format: str | None = None,
    description: CheckpointDescription | None = None,
) -> Checkpoint:
    """Open an SAE with the one format that claims its folder (or file), or as the user describes it.

    Args:
        location: the folder or file.
        variant: which of several sets of weights.
        format: name of the layout, where several claim the folder.
        description: the user's description of a home-made checkpoint.

    Raises:
        CheckpointError: if no format, or more than one, claims it, or the given one does not.
        InputError: if it is described as home-made and is in a known layout.
        MissingFileError: if the SAEs are in folders below.
        UnknownNameError: if there is no format of that name.
    """
    location = location.without_known_errors()
    if description is not None:
        _require_home_made(location, variant, format)
        return open_home_made(location, description)
    if format is not None:
        return requested_layout(format, location).open(location, variant=variant)
    claims, unreadable = claims_of(location)
    if len(claims) > 1:
        raise CheckpointError(
            f"{location} could be any of the formats {', '.join(claims)}: it has {location.listing()}. "
            f"Expected the files of one SAE; choose with format={claims[0]!r}, or remove or move the others."
        )
    if not claims:
        raise _nothing_found(location, unreadable)
    return formats[claims[0]].open(location, variant=variant)


def _require_home_made(location: Location, variant: str | None, format: str | None) -> None:
    """Raise if a checkpoint that is described as home-made is in a known layout, which needs no description.

    Raises:
        InputError: naming the layout.
    """
    if format == HOME_MADE:
        return
    if format is not None:
        raise InputError(
            f"Given format={format!r} and architecture=, which describes a home-made checkpoint: pass one of them."
        )
    for name in claims_of(location)[0]:
        try:
            formats[name].open(location, variant=variant)
        except SAEError:  # its files only have the names of that layout
            continue
        raise InputError(
            f"{location} is in the layout {name!r}, which states its own architecture: omit architecture=, names= and "
            f"ignore=. To read its tensors as a home-made checkpoint nevertheless, pass format={HOME_MADE!r}."
        )


def sae_addresses(location: Location) -> list[str]:
    """Return the addresses, relative to the root, of SAEs at or below `location`, from the names of files."""
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    found = {address for layout in formats.values() for address in layout.addresses(location)}
    return sorted(((prefix + address).rstrip("/") for address in found), key=natural_order)


def natural_order(address: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts ``layer_2`` before ``layer_10``."""
    parts = re.findall(r"\d+|\D+", address)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _shown(folders: list[str]) -> str:
    """Return folders for a message."""
    return ", ".join(map(repr, folders[:SHOWN_FOLDERS])) + (
        f", ... ({len(folders)})" if len(folders) > SHOWN_FOLDERS else ""
    )


def _no_such_folder(root: Location, location: Location) -> MissingFileError:
    """Return the error for a folder without files."""
    if not location.subfolder:
        return MissingFileError(f"{location} is empty; expected config.json and model.safetensors.")
    known = [folder for folder in sae_addresses(root) if folder] or root.folders
    return MissingFileError(
        f"{root} has no folder {location.subfolder!r}.{did_you_mean(location.subfolder, known)} "
        f"Pass subfolder= one of: {_shown(known) or 'there is none, the SAE is in the root'}."
    )


def _nothing_found(location: Location, unreadable: list[CheckpointError]) -> CheckpointError | MissingFileError:
    """Return the error for a folder that no format claims.

    Args:
        location: the folder or file.
        unreadable: errors of formats that could not read a file that they need.
    """
    addresses = sae_addresses(location)
    if location.file is not None and location.subfolder in addresses:
        what = f"pass subfolder={location.subfolder!r}" if location.subfolder else "omit subfolder="
        return MissingFileError(f"{location} is one file of the SAE in its folder: {what}.")
    below = [address for address in addresses if address != location.address]
    if below and (not unreadable or location.address not in addresses):
        return MissingFileError(
            f"{location} itself holds no SAE, but folders or files in it do: pass subfolder= one of {_shown(below)}."
        )
    found = advice(location)
    if unreadable and NEAREST not in found:
        messages = list(dict.fromkeys(map(str, unreadable)))
        return unreadable[0] if len(messages) == 1 else CheckpointError(" ".join(messages))
    reasons = [str(error) for error in unreadable if str(error) not in found] or _near_misses(location)
    known = "" if NEAREST in found else f"; known formats: {', '.join(formats)}"
    sentences = [*dict.fromkeys(reasons or [f"It has {location.listing()}{known}."]), found]
    return CheckpointError(f"{location} holds no SAE in a known format. {' '.join(filter(None, sentences))}")


def _near_misses(location: Location) -> list[str]:
    """Return why layouts that the folder resembles do not claim it."""
    return [reason for layout in formats.values() if (reason := layout.near_miss(location))]
