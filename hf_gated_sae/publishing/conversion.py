"""Converting another library's checkpoint to the native layout, with a card that credits its authors."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from .. import __version__
from ..errors import InputError, PublishError, did_you_mean, unknown_name
from ..formats import claims_of, locate_sae, open_at
from ..hub.error_messages import explained
from ..hub.licences import OTHER
from ..hub.location import LocalFolder, Location, clean_subfolder
from ..modeling import SAEModel
from ..modeling.description import CheckpointDescription, describe_checkpoint
from ..modeling.loading import load
from .facts import CardFacts
from .push import push_to_hub
from .save_published import CARD_FILE, save
from .stated_licence import Licence, stated_licence

OWN = "native"
ROOT = "root of the repository"
DTYPES = ("float32", "float16", "bfloat16", "float64")


def convert(
    source: str | os.PathLike[str],
    subfolder: str = "",
    *,
    revision: str | None = None,
    dtype: str | None = None,
    license: str | None = None,  # spelt as on the Hub
    license_name: str | None = None,
    license_link: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    format: str | None = None,
    architecture: str | None = None,
    names: Mapping[str, str | None] | None = None,
    ignore: str | Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Open a checkpoint of any layout; `Conversion.save` and `Conversion.push` then write it in the native layout.

    Args:
        source: repository id, ``repository@revision``, or folder.
        subfolder: folder (or file) of the SAE inside it.
        revision: branch, tag or commit of the source.
        dtype: of the stored weights, such as ``"bfloat16"``; that of the source by default.
        license: licence of the Hub's list, for a source that states none; see `hub.licences.normalise`.
        license_name: name of a licence ``"other"``.
        license_link: address or file of a licence ``"other"``.
        token: access token; None uses the stored one.
        cache_dir: folder of the Hub cache.
        local_files_only: read from the cache only.
        format: name of the layout, if several share the folder.
        architecture: of a home-made checkpoint; as for `SAEModel.from_pretrained`, like `names` and `ignore`.
        names: see `SAEModel.from_pretrained`.
        ignore: see `SAEModel.from_pretrained`.
        options: keys of the configuration, such as ``{"site": "resid_post.3"}``.

    Returns:
        The conversion; no weights have been read yet.

    Raises:
        CheckpointError: if it is not an SAE in a known format.
        InputError: if it is already in the native layout, the dtype or the licence is unknown, or the source states
            another licence.
        MissingFileError: if there is no such folder, repository, revision or file.
    """
    given = given_licence(license, license_name, license_link)
    location = locate_sae(
        os.fspath(source),
        subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    description = describe_checkpoint(architecture, names, ignore, options)
    return Conversion(location, dtype=dtype, licence=given, format=format, description=description, options=options)


class Conversion:
    """The conversion of one checkpoint to the native layout. Weights are read when they are needed.

    Args:
        location: of the checkpoint.
        dtype: of the stored weights; None for that of the source.
        licence: for a source that states none; see `given_licence`.
        format: name of the layout, if several share the folder.
        description: the user's description of a home-made checkpoint.
        options: keys of the configuration that the user gives.

    Attributes:
        checkpoint: configuration, origin and headers.
        licence: of the checkpoint, as far as it is known.
    """

    def __init__(
        self,
        location: Location,
        *,
        dtype: str | None = None,
        licence: Licence | None = None,
        format: str | None = None,
        description: CheckpointDescription | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
        self.location = location
        self.dtype = dtype
        self.format = format
        self.description = description
        self.options = dict(options or {})
        self.checkpoint = open_at(location, format=format, description=description)
        self.origin = self.checkpoint.origin
        known = self.checkpoint.model_class.config_class.own_fields()
        for name in self.options:
            if name not in known:
                raise unknown_name("option", name, known, error=InputError)
        if self.origin.format == OWN:
            raise InputError(
                f"{location} is already in the native layout, so there is nothing to convert: load it with "
                "SAEModel.from_pretrained; its save_pretrained and push_to_hub keep its facts."
            )
        self.licence = _reconciled(stated_licence(location), licence, location)

    @cached_property
    def sae(self) -> SAEModel:
        """The SAE, read at the first access."""
        dtype = {} if self.dtype is None else {"dtype": getattr(torch, self.dtype)}
        return load(self.checkpoint, None, {**self.options, **dtype})[0]

    @property
    def facts(self) -> CardFacts:
        """Facts for the card: origin of the weights, licence, and the command that repeats the conversion."""
        origin = self.origin
        provenance: dict[str, Any] = {
            "converted from": f"{origin.repo}@{origin.revision}" if origin.revision else "a local folder",
            "address": origin.subfolder or ROOT,
            "original layout": origin.format,
            "original files": ", ".join(origin.files),
            "dtype": str(self.sae.dtype).removeprefix("torch."),
            "converted with": f"hf-gated-sae {__version__}",
            "licence according to": self.licence.evidence,
        }
        if origin.revision:
            provenance["command"] = self.command
        return CardFacts(
            license=self.licence.name or "unknown",
            **self._other_licence(),
            description=self._description(),
            training={"trained by": "the authors of the original, not the publisher of this copy"},
            provenance=provenance,
        )

    @property
    def command(self) -> str:
        """The command that repeats the conversion, from the same commit."""
        origin = self.origin
        words = ["hf-gated-sae", "convert", origin.repo, *([origin.subfolder] if origin.subfolder else [])]
        words += ["--revision", str(origin.revision), *(["--dtype", self.dtype] if self.dtype else [])]
        words += ["--format", self.format] if self.format else []
        if self.description is not None:
            words += ["--architecture", self.description.architecture]
            for parameter, tensor in self.description.names.items():
                words += ["--name", f"{parameter}={tensor or ''}"]
            for pattern in self.description.ignore:
                words += ["--ignore", pattern]
        for name, value in self.options.items():
            words += ["--option", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return shlex.join([*words, "--out", "converted"])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write weights, configuration, facts and card; either all files or none.

        Args:
            folder: created if needed; hand-written parts of its README are kept.

        Raises:
            InputError: if the folder holds the original, or a checkpoint in another library's layout.
        """
        self._require_free(Path(folder))
        return save(self.sae, folder, self.facts)

    def push(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Publish in one commit, after checking that it may be published.

        Args:
            repo_id: ``owner/name``, created if needed.
            subfolder: folder inside it; the root by default.
            revision: branch to commit to.
            private: whether a repository that has to be created is private.
            create_pr: open a pull request instead of committing.
            token: access token; None uses the stored one.

        Raises:
            InputError: if it would overwrite the original.
            PublishError: if the repository is public, and the licence is not known, or the source is gated, private or
                a local folder.
        """
        if (repo_id.lower(), clean_subfolder(subfolder)) == (self.origin.repo.lower(), self.location.subfolder):
            raise InputError(
                f"{self.origin} would overwrite its own original; push to another repository or subfolder."
            )
        self.require_publishable(repo_id, private=private, token=token)
        return push_to_hub(
            self.sae,
            repo_id,
            subfolder=subfolder,
            revision=revision,
            private=private,
            create_pr=create_pr,
            token=token,
            facts=self.facts,
            commit_message=f"Convert {self.origin if self.origin.revision else 'a local checkpoint'}",
        )

    def require_publishable(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
    ) -> None:
        """Raise unless the conversion may be published in a repository.

        Raises:
            PublishError: with the reason, and what to do.
        """
        api = HfApi(token=token)
        target = _info(api, repo_id)
        if private or (target is not None and target.private):
            return
        origin, advice = self.origin, "or publish it with private=True (--private)."
        if origin.revision is None:
            raise PublishError(
                f"{origin} is a folder on this machine, so others could not verify the conversion: convert from the "
                f"repository id of the original, {advice}"
            )
        if self.licence.name is None:
            raise PublishError(
                f"The licence of {origin} is not known ({self.licence.evidence}), so it may not permit publishing a "
                f"copy: ask its authors and pass license= (--license), {advice}"
            )
        source = _info(api, origin.repo)
        if source is None or source.private:
            raise PublishError(f"The source {origin.repo} is not public; ask its owner, {advice}")
        if source.gated and not (target is not None and target.gated):
            raise PublishError(
                f"The source {origin.repo} is gated, and a copy without a gate would bypass its conditions: gate "
                f"{repo_id} in its settings first, {advice}"
            )

    def _other_licence(self) -> dict[str, Any]:
        """Return name and link of a licence that is not on the Hub's list; a file of the source becomes an address."""
        if self.licence.name != OTHER:
            return {}
        link, origin = self.licence.link, self.origin
        if origin.revision and not (link or "").startswith(("http://", "https://")):
            page = f"https://huggingface.co/{origin.repo}"
            link = f"{page}/blob/{origin.revision}/{link}" if link else f"{page}/tree/{origin.revision}"
        return {"license_name": self.licence.title, "license_link": link or CARD_FILE}

    def _description(self) -> str:
        """Return the prose of the card."""
        origin = self.origin
        if origin.revision is None:
            return (
                "**Converted, not trained, by the publisher of this copy.** The weights come from a local folder, in "
                f"the layout `{origin.format}`; others cannot repeat the conversion."
            )
        page = f"https://huggingface.co/{origin.repo}/tree/{origin.revision}"
        where = f"`{origin.subfolder}` in " if origin.subfolder else ""
        return (
            f"**Converted, not trained, by the publisher of this copy.** The weights are those of {where}"
            f"[{origin.repo}]({page}), rewritten from the layout `{origin.format}` so that one latent is one row of "
            "every tensor. Credit belongs to the authors of the original: cite their work. The metrics that they "
            "report are on their page; they are not repeated here because they were not measured on this copy."
        )

    def _require_free(self, folder: Path) -> None:
        """Raise if a folder holds a checkpoint in another library's layout.

        Raises:
            InputError: naming that layout.
        """
        if not folder.is_dir():
            return
        names = [path.name for path in folder.iterdir() if path.is_file()]
        there = LocalFolder(str(folder), all_files=names)
        found = [name for name in claims_of(there)[0] if name != OWN]
        if isinstance(self.location, LocalFolder) and _is_within(self.location, folder):
            found = [self.origin.format]
        if found:
            raise InputError(
                f"{folder} holds a checkpoint in the layout {found[0]}; with the converted one in the same folder, "
                "the layout would be ambiguous. Pass another folder."
            )


def _is_within(source: LocalFolder, folder: Path) -> bool:
    """Whether a folder is the one that holds a local checkpoint."""
    return (source.root / source.subfolder).resolve() == folder.resolve()


def given_licence(license: str | None, name: str | None = None, link: str | None = None) -> Licence | None:
    """Return the licence that the user states for a source; None if none is given.

    Args:
        license: as for `hub.licences.normalise`.
        name: of a licence ``"other"``.
        link: of a licence ``"other"``.

    Raises:
        InputError: if the licence is not on the Hub's list, or is ``"unknown"``.
    """
    found = CardFacts(license=license, license_name=name, license_link=link).licensed().license
    if found is None:
        return None
    if found == "unknown":
        raise InputError(f"Given license {license!r}; expected a licence identifier of the Hub, such as 'apache-2.0'.")
    return Licence(found, "the publisher of this copy; the source states none", title=name, link=link)


def _reconciled(stated: Licence, given: Licence | None, location: Location) -> Licence:
    """Return the licence of the source or, if it states none, the given one.

    Raises:
        InputError: if the two differ; only the authors can change a licence.
    """
    if given is None:
        return stated
    if stated.name is None:
        return given
    if stated.name != given.name or (given.title and stated.title != given.title):
        raise InputError(
            f"Given license {given.title or given.name!r}, but {location} is published under {stated.name!r} "
            f"({stated.evidence}); omit license= (--license)."
        )
    return stated


def _info(api: HfApi, repo_id: str) -> Any:
    """Return the Hub's information on a repository; None if it does not exist or is not visible."""
    with explained(repo_id, None):
        try:
            return api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None
        except HFValidationError as error:
            raise InputError(f"Given repository {repo_id!r}; expected 'owner/name', such as 'me/my-sae'.") from error
