"""Save interventions to a file, so that others can apply the same ones, and load them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

from ..errors import InputError, MissingFileError, SAEError, did_you_mean, shown, unknown_name
from ..functional.short_repr import few_lines
from ..modeling import SAEModel
from ..storage.atomic_write import written_together
from ._json_values import DTYPES, read, whole_numbers, written
from ._pinning import checked_hashes, hashes, read_path, require_same_files, require_unchanged, written_path
from .base import Intervention, interventions

VERSION = 2
_READ = (1, VERSION)  # version 1 did not pin local SAEs, and had absolute paths to them
_PLAN = {"version", "saes", "interventions"}
_LATENTS, _SITES = {"latents", "needed"}, {"sites", "sites_out"}


@dataclass(frozen=True)
class Reference:
    """Where an SAE of a plan is loaded from, and how.

    Attributes:
        repo: repository id; or a folder, as a path relative to the plan's folder if it is near, else absolute.
        subfolder: the SAE's folder or file in it.
        revision: commit; None for a folder.
        dtype: the SAE's dtype.
        site: the site in its configuration; None for an SAE of several sites.
        site_out: the site that a transcoder writes.
        latents: the latents that were loaded; None for all of them.
        needed: the latents that the plan's interventions need; None for all of them.
        sites: the sites that an SAE of several sites reads; else None.
        sites_out: the sites that it writes.
        files: sha256 of each of its files, by name; None with a commit, and in plans of version 1.
    """

    repo: str
    subfolder: str
    revision: str | None
    dtype: str
    site: str | None
    site_out: str | None
    latents: tuple[int, ...] | None
    needed: tuple[int, ...] | None
    sites: tuple[str, ...] | None = None
    sites_out: tuple[str, ...] | None = None
    files: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls, sae: SAEModel, needed: Iterable[int] | None, *, folder: Path | None, arguments: Mapping[str, Any]
    ) -> Reference:
        """Return a reference to a loaded SAE.

        Args:
            sae: the SAE.
            needed: the latents that are needed; None for all of them.
            folder: folder of the plan; None if that is not known.
            arguments: for `SAEModel.from_pretrained`, which loads it again to compare.

        Raises:
            InputError: if it was not loaded from a checkpoint, or differs from it.
        """
        origin, config = sae.checkpoint, sae.config
        if origin is None:
            raise InputError(
                f"The {type(sae).__name__} at {', '.join(config.sites_read) or 'no site'} was not loaded from a "
                "checkpoint, to which a plan could refer: save it with save_pretrained or push_to_hub, and load that "
                "with SAEModel.from_pretrained."
            )
        is_folder = origin.revision is None
        held = config.kept_latents
        found = cls(
            repo=written_path(origin.repo, None) if is_folder else origin.repo,
            subfolder=origin.subfolder,
            revision=origin.revision,
            dtype=str(sae.dtype).removeprefix("torch."),
            site=config.site if sae.one_site else None,
            site_out=config.site_out if sae.one_site else None,
            latents=None if held is None else tuple(held),
            needed=None if needed is None or not (sae.elementwise and sae.sliceable) else tuple(needed),
            sites=None if sae.one_site else tuple(config.sites_read),
            sites_out=None if sae.one_site else tuple(config.sites_written),
        )
        cache = {} if origin.cache_dir is None else {"cache_dir": origin.cache_dir}
        require_unchanged(sae, found.load(only_needed=False, folder=None, arguments={**cache, **arguments}))
        return replace(found, repo=written_path(origin.repo, folder), files=hashes(origin)) if is_folder else found

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON-compatible values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, content: Any) -> Reference:
        """Read the result of `to_dict`.

        Raises:
            InputError: if it is not one.
        """
        names = {field.name for field in fields(cls)} - {"files"}
        require_keys("An SAE of the plan", content, names - _SITES, {*_SITES, "files"})
        for name in _SITES & set(content):
            found = content[name]
            if found is not None and not (isinstance(found, list) and all(isinstance(site, str) for site in found)):
                raise InputError(f"{name} of an SAE of the plan is {shown(found)}; expected a list of sites.")
        for name in names - _SITES - _LATENTS:
            if not isinstance(content[name], str) and (content[name] is not None or name in ("repo", "subfolder")):
                raise InputError(f"{name} of an SAE of the plan is {shown(content[name])}; expected text.")
        if content["dtype"] not in DTYPES or not DTYPES[content["dtype"]].is_floating_point:
            raise InputError(
                f"dtype of an SAE of the plan is {shown(content['dtype'])}; expected a floating-point dtype, such as "
                "'float32'."
            )
        lists = {name: None if content[name] is None else whole_numbers(content[name]) for name in _LATENTS}
        lists |= {name: None if content[name] is None else tuple(content[name]) for name in _SITES & set(content)}
        pinned = content.get("files")
        files = None if pinned is None else checked_hashes(pinned)
        return cls(**{**content, **lists, "files": files})

    def load(self, *, only_needed: bool, folder: Path | None, arguments: Mapping[str, Any]) -> SAEModel:
        """Load the SAE, or only the latents that the plan needs.

        Args:
            only_needed: whether to load only the latents that the plan needs.
            folder: folder of the plan; None for the current folder.
            arguments: for `SAEModel.from_pretrained`.

        Raises:
            CheckpointError: if the files of a local SAE do not have the pinned hashes.
            MissingFileError: if the SAE is not at the location in the plan.
        """
        one = {name: value for name, value in (("site", self.site), ("site_out", self.site_out)) if value}
        several = {
            name: list(value) for name, value in (("sites", self.sites), ("sites_out", self.sites_out)) if value
        }
        sites = {**one, **several}
        latents = self.needed if only_needed and self.needed is not None else self.latents
        some = {} if latents is None else {"latents": list(latents)}
        settings = {"revision": self.revision, "dtype": DTYPES[self.dtype], **sites, **some, **arguments}
        repo = self.repo if self.revision is not None else read_path(self.repo, folder)
        sae: SAEModel = SAEModel.from_pretrained(repo, self.subfolder, **settings)
        if self.files is not None and sae.checkpoint is not None:
            require_same_files(sae.checkpoint, self.files)
        return sae


class InterventionPlan(Sequence[Intervention]):
    """Interventions, to be attached with ``attach(model, *plan)``, or saved to a file and loaded.

    The file has the verbs with all their settings, tensors included bit for bit, and the location of each SAE: on the
    Hub pinned to a commit, in a folder by the sha256 of its files. A folder near the plan is named by its relative
    path, so that both can be moved together. Weights are not in the plan: an SAE that was changed after it was loaded
    is refused. The file is JSON::

        {"version": 2,
         "saes": [{"repo": "../saes", "subfolder": "a", "revision": null, "files": {"config.json": "<sha256>", ...},
                   "dtype": "float32", "site": "resid_post.1", "latents": null, "needed": [3], ...}],
         "interventions": [{"verb": "Clamp", "sae": {"sae": 0}, "values": {"mapping": [[3, 8.0]]}, ...}]}

    The fields of an SAE are those of `Reference`, the settings of a verb those of its class. ``{"sae": 0}`` is the
    first SAE of the list; other values that JSON does not have are written as ``{"tensor": ...}``,
    ``{"mapping": ...}``, ``{"site": ...}``, ``{"slice": ...}`` and ``{"token_ids": ...}``.

    Args:
        interventions: the interventions.

    Raises:
        InputError: if one of them is not an intervention.
    """

    def __init__(self, interventions: Iterable[Intervention]) -> None:
        self.interventions = tuple(interventions)
        for each in self.interventions:
            if not isinstance(each, Intervention):
                raise InputError(
                    f"InterventionPlan was given {type(each).__name__}; expected interventions, as Ablate(sae, [3])."
                )

    @overload
    def __getitem__(self, index: int) -> Intervention: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Intervention]: ...
    def __getitem__(self, index: int | slice) -> Intervention | Sequence[Intervention]:
        """Return an intervention."""
        return self.interventions[index]

    def __len__(self) -> int:
        """Return the number of interventions."""
        return len(self.interventions)

    def __iter__(self) -> Iterator[Intervention]:
        """Iterate over the interventions."""
        return iter(self.interventions)

    def __repr__(self) -> str:
        """Show the verbs."""
        return few_lines([f"InterventionPlan({', '.join(type(each).__name__ for each in self)})"])

    def to_dict(self, *, folder: str | Path | None = None, **arguments: Any) -> dict[str, Any]:
        """Return the plan as JSON-compatible values.

        Each SAE is loaded again to check that it still equals its checkpoint, and the files of a local one are hashed:
        a few seconds for one of 1.2 GB.

        Args:
            folder: folder of the plan, from which SAEs near it get relative paths.
            **arguments: for `SAEModel.from_pretrained`, such as ``token``.

        Raises:
            InputError: if an SAE was not loaded from a checkpoint, or has been changed since, or a value of a verb
                cannot be written.
            MissingFileError: if an SAE is no longer where it was loaded from.
        """
        saes: dict[SAEModel, list[Intervention]] = {}
        entries = []
        for intervention in self.interventions:
            verb = type(intervention).__name__
            if interventions[verb] is not type(intervention):
                raise InputError(f"Another verb is registered under the name {verb}; give this class another name.")

            def number_of(sae: SAEModel, user: Intervention = intervention) -> int:
                saes.setdefault(sae, []).append(user)
                return list(saes).index(sae)

            values = {name: written(getattr(intervention, name), number_of) for name in _settings(type(intervention))}
            entries.append({"verb": verb, **values})
        start = None if folder is None else Path(folder)
        references = [
            Reference.of(sae, _needed(users), folder=start, arguments=arguments).to_dict()
            for sae, users in saes.items()
        ]
        return {"version": VERSION, "saes": references, "interventions": entries}

    @classmethod
    def from_dict(
        cls, content: Any, *, only_needed: bool = False, folder: str | Path | None = None, **arguments: Any
    ) -> InterventionPlan:
        """Build a plan from the result of `to_dict`, and load its SAEs, each once.

        Args:
            content: the decoded JSON.
            only_needed: whether to load only the latents that the plan needs, where some suffice.
            folder: start of relative paths of SAEs; the current folder by default.
            **arguments: for `SAEModel.from_pretrained`, such as ``token`` or ``device_map``.

        Raises:
            InputError: if it is not a plan, or of another version, or a verb is unknown or cannot be built.
            CheckpointError: if the files of a local SAE do not have the pinned hashes.
            MissingFileError: if an SAE is not at the location in the plan.
        """
        require_keys("The plan", content, _PLAN)
        if type(content["version"]) is not int or content["version"] not in _READ:
            raise InputError(
                f"The plan's version is {shown(content['version'])}, and this version of hf-gated-sae reads "
                f"{' and '.join(map(str, _READ))}."
            )
        for name in ("saes", "interventions"):
            if not isinstance(content[name], list):
                raise InputError(f"{name} of the plan is {shown(content[name])}; expected a list.")
        references = [Reference.from_dict(each) for each in content["saes"]]
        for entry in content["interventions"]:  # before anything is loaded
            _verb_of(entry)
        loaded: dict[int, SAEModel] = {}
        start = None if folder is None else Path(folder)

        def sae_of(number: int) -> SAEModel:
            if not 0 <= number < len(references):
                raise InputError(f"The plan names its SAE {number}, and has {len(references)}, counted from 0.")
            if number not in loaded:
                loaded[number] = references[number].load(only_needed=only_needed, folder=start, arguments=arguments)
            return loaded[number]

        built = []
        for number, entry in enumerate(content["interventions"]):
            verb = _verb_of(entry)
            values = {name: read(value, sae_of) for name, value in entry.items() if name != "verb"}
            try:
                built.append(verb(**values))
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
                if isinstance(error, SAEError):
                    raise
                raise InputError(
                    f"Intervention {number} of the plan cannot be built: {shown(str(error), 200)}."
                ) from error
        return cls(built)

    def save(self, path: str | Path, **arguments: Any) -> None:
        """Write the plan to a JSON file, completely or not at all.

        Args:
            path: the file; it is replaced if it exists.
            **arguments: as for `to_dict`.

        Raises:
            InputError: as `to_dict`, or if the path is a folder.
            MissingFileError: as `to_dict`.
        """
        file = Path(path)
        if file.is_dir():
            raise InputError(f"{file} is a folder; expected a file, such as {file / 'plan.json'}.")
        text = json.dumps(self.to_dict(folder=file.parent, **arguments), indent=2, allow_nan=False)
        with written_together(file.parent) as staging:
            (staging / file.name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, only_needed: bool = False, **arguments: Any) -> InterventionPlan:
        """Read a plan from a file, and load its SAEs.

        Args:
            path: the file.
            only_needed: whether to load only the latents that the plan needs, where some suffice.
            **arguments: for `SAEModel.from_pretrained`, such as ``token`` or ``device_map``.

        Raises:
            MissingFileError: if there is no such file.
            InputError: as `from_dict`, or if it is not JSON.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise InputError(f"InterventionPlan.load was given {shown(path)}; expected the path of a file.")
        file = Path(path)
        if not file.is_file():
            raise MissingFileError(f"There is no file {file}; expected a plan that InterventionPlan.save wrote.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is not JSON ({shown(str(error), 100)}); expected a plan.") from error
        return cls.from_dict(content, only_needed=only_needed, **{"folder": file.parent, **arguments})


def require_keys(what: str, content: Any, expected: set[str], optional: Iterable[str] = ()) -> None:
    """Raise unless a value from a file is a mapping with the expected keys, and optional ones.

    Raises:
        InputError: naming missing or unknown keys.
    """
    if not isinstance(content, dict):
        raise InputError(f"{what} is {shown(content)}; expected a mapping with {', '.join(sorted(expected))}.")
    if unknown := sorted(map(str, set(content) - expected - set(optional))):
        raise InputError(
            f"{what} has {shown(unknown[0])}, which is unknown.{did_you_mean(unknown[0], [*expected, *optional])}"
        )
    if missing := sorted(expected - set(content)):
        raise InputError(f"{what} lacks {', '.join(missing)}.")


def _settings(verb: type[Intervention]) -> dict[str, bool]:
    """Return the names of a verb's settings, and whether each is required."""
    return {
        field.name: field.default is MISSING and field.default_factory is MISSING
        for field in fields(verb)
        if field.init
    }


def _verb_of(entry: Any) -> type[Intervention]:
    """Return the class of an intervention in a file.

    Raises:
        InputError: if the verb is unknown, or its settings are missing or unknown.
    """
    name = entry.get("verb") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise InputError(f"An intervention of the plan is {shown(entry)}; expected its 'verb' and settings.")
    if name not in interventions:
        raise unknown_name("verb", name[:80], interventions)
    settings = _settings(interventions[name])
    required = {setting for setting, needed in settings.items() if needed}
    require_keys(f"{name} in the plan", entry, {"verb", *required}, settings)
    return interventions[name]


def _needed(users: Iterable[Intervention]) -> list[int] | None:
    """Return the latents of one SAE that interventions need; None for all of them."""
    needed: dict[int, None] = {}
    for user in users:
        latents = getattr(user, "latents_needed", None)
        if latents is None:
            return None
        needed.update(dict.fromkeys(latents))
    return list(needed)
