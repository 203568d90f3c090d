"""Combine a YAML file, flags and a preset into one run, and check that its settings are consistent."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Union

from ...architectures import architectures
from ...errors import InputError, SAEError, unknown_name
from ...hub.licences import normalise
from ...modeling import SAEModel
from ..arguments import SAETrainingArguments
from ..group import require_names
from ..presets import presets
from ..remedies import remedies
from ..streams.dataset import BUILDERS, kind_of
from .run_config import DataSettings, RunConfig, SAESettings
from .strict_yaml import hints_of, leaves, merged, read_section, read_value, read_yaml, unknown_key

RUN_DEFAULTS: dict[str, Any] = {"training": {"save_strategy": "steps", "save_steps": 1000, "save_total_limit": 2}}
"""Defaults of a run where they differ from the trainer's, so that a run can be resumed."""

DECIDED_BY_THE_RUN = frozenset(
    {"d_in", "d_out", "d_sae", "site", "site_out", "base_model", "base_model_revision", "kept_latents"}
    | {"recorded_tokens", "recorded_fvu", "recorded_l0", "recorded_norm", "trained_on_bos"}
    | {"special_token_ids", "norm_limit", "norm_limit_out"}
)
"""Fields of an SAE's configuration that follow from the rest of the run."""

ELSEWHERE = {
    "output_dir": "output_dir, beside training",
    "seed": "seed, beside training",
    "sparsity_coefficient": "sae.sparsity_coefficient",
    "objective": "sae.objective",
    "resume_from_checkpoint": "--resume",
    "per_device_train_batch_size": "training.activation_batch_size",
    "num_train_epochs": "training.max_steps",
}
"""Arguments of the trainer that a run states in another place."""

ALTERNATIVES = (("sae.d_sae", "sae.expansion_factor"), ("model.device", "model.device_map"))
"""Pairs of which at most one can be given; it replaces the other one in the settings that it overrides."""

SOURCES = ("dataset", "files", "shards")
NOT_OF_SHARDS = (
    *("text_column", "documents", "context_length", "packing", "bos", "eos", "special_tokens"),
    *("sequences_per_batch", "buffer_size", "save_buffer", "held_out", "held_out_tokens"),
)
FOREIGN = {
    "dataset": ("documents",),
    "files": ("config", "split", "revision"),
    "shards": ("config", "split", "revision", "streaming", *NOT_OF_SHARDS),
}
"""Settings of the data that do not apply to a source."""
OF_REMEDIES = {
    "resample": ("resample_steps", "resample_inputs", "lr_dip", "lr_dip_steps"),
    "auxk": ("auxk_latents", "auxk_coefficient"),
    "pre_activation_pull": ("pull_coefficient",),
}
"""Arguments of the trainer that apply to one remedy for dead latents only."""

DTYPES = ("float32", "bfloat16")
"""Dtypes that SAEs can be trained in: the range of float16 is too small for the moments, and float64 has no use."""

NOTHING = (None, "null", "~")
"""What means no value, in a file or as the text of a flag."""

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def read_run(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a run: flags over the file over the preset over the defaults.

    Args:
        path: of the YAML file; None for flags alone.
        flags: nested mapping, see `read_flags`.

    Raises:
        MissingFileError: if there is no such file.
        InputError: for an unknown key, a wrong value, or two that contradict each other; the message has their keys.
    """
    return assemble({} if path is None else read_yaml(path), flags)


def assemble(given: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the run that a nested mapping describes, with flags laid over it; errors as for `read_run`."""
    given = _under_flags(_sections(given), _sections(flags or {}))  # a flag may be a whole section, and lies over one
    explicit = dict(leaves(given))
    below = _preset(given.get("preset"))
    _settle_remedy(explicit, below.setdefault("training", {}))
    common = below.pop("sae", {})
    whole = _over(merged(RUN_DEFAULTS, below), given)
    if saes := whole.get("saes"):
        mine = whole.get("sae") or {}
        each = {name: _over({"sae": mine}, {"sae": section or {}}, f"saes.{name}.") for name, section in saes.items()}
        whole["saes"] = {name: _over_preset(common, section["sae"]) for name, section in each.items()}
        whole.pop("sae", None)
    else:
        whole["sae"] = _over_preset(common, whole.get("sae") or {})
    config = _at_home(read_section(RunConfig, whole))
    _check_data(config.data, explicit)
    if config.model is None and config.data.shards is None:
        raise InputError("model.name is missing: give the model that computes activations from the text.")
    if config.saes:
        require_names(config.saes)
    config = _checked_saes(config)
    if config.license is not None or config.license_name is not None or config.license_link is not None:
        named = {"name": config.license_name, "link": config.license_link}
        config = dataclasses.replace(config, license=normalise(config.license or "", **named))
    config = dataclasses.replace(config, training=_read_training(config.training))
    args = arguments(config)  # raises now for what the trainer would refuse
    buffer = config.data.buffer_size
    if buffer is not None and buffer < 2 * args.activation_batch_size:
        raise InputError(
            f"data.buffer_size is {buffer}; expected at least two batches, {2 * args.activation_batch_size}, to "
            "shuffle."
        )
    return config


def plain(config: RunConfig) -> dict[str, Any]:
    """Return a run as the content of a complete YAML file, its preset's settings included; see `assemble`."""
    whole = {name: value for name, value in asdict(config).items() if value is not None and name != "preset"}
    if config.saes:
        whole["saes"] = {name: _flat(section) for name, section in whole["saes"].items()}
    else:
        whole["sae"] = _flat(whole["sae"])
    whole.pop("sae" if config.saes else "saes")
    foreign = _foreign(config.data)
    for section in ("model", "data"):
        found = whole.get(section, {})
        whole[section] = {name: value for name, value in found.items() if value is not None and name not in foreign}
    return {name: value for name, value in whole.items() if value != {}}


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in section.items() if name != "settings" and value not in (None, {})}
    return kept | dict(section["settings"])


def arguments(config: RunConfig, **changes: Any) -> SAETrainingArguments:
    """Return the trainer's arguments.

    Args:
        config: the run.
        **changes: arguments that replace those of the run.

    Raises:
        InputError: if the trainer, or transformers, refuses them.
    """
    values = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        **config.training,
    }
    values |= _by_sae("sparsity_coefficient", {name: sae.sparsity_coefficient for name, sae in config.named.items()})
    values |= _by_sae("objective", {name: sae.objective for name, sae in config.named.items()})
    try:
        return SAETrainingArguments(**{**values, **changes})
    except SAEError as error:
        raise InputError(f"training: {error}") from error
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error


def _by_sae(argument: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an argument of the trainer with one value, or one per SAE as a mapping; empty without any value."""
    if not any(value not in (None, {}) for value in given.values()):
        return {}
    default = SAETrainingArguments.sparsity_coefficient
    filled = {name: default if value is None else value for name, value in given.items()}
    return {argument: filled.get("", filled)}


def setting_names(sae_class: type[SAEModel]) -> list[str]:
    """Return the fields of an architecture's configuration that a run can set."""
    return [name for name in sae_class.config_class.own_fields() if name not in DECIDED_BY_THE_RUN]


# ---------------------------------------------------------------------- what is refused


def _sections(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with sections that are mappings; merging would hide that one is not.

    Raises:
        InputError: for a section that is something else.
    """
    found = dict(given)
    for name in ("model", "data", "sae", "saes", "training"):
        if not isinstance(given.get(name), (Mapping, type(None))):
            found[name] = read_value(dict[str, Any], given[name], name)  # a flag's text may be a whole section
    for name, section in (found.get("saes") or {}).items():
        if not isinstance(section, (Mapping, type(None))):
            found["saes"] = {**found["saes"], name: read_value(dict[str, Any], section, f"saes.{name}")}
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any], place: str = "sae.") -> dict[str, Any]:
    """Return settings laid over others, where they also replace their alternatives.

    Args:
        below: nested mapping.
        above: nested mapping.
        place: where its section "sae" stands, for errors.

    Raises:
        InputError: if it gives two settings of which at most one can be given.
    """
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in below.items()}
    for pair in ALTERNATIVES:
        section = pair[0].partition(".")[0]
        names = [each.partition(".")[2] for each in pair]
        chosen = [name for name in names if (above.get(section) or {}).get(name) not in NOTHING]
        if len(chosen) == len(pair):
            first, second = (f"{place if section == 'sae' else section + '.'}{name}" for name in names)
            raise InputError(f"Given both {first} and {second}; expected one of them.")
        for name in names if chosen and found.get(section) else ():
            found[section].pop(name, None)
    return merged(found, above)


def _under_flags(given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with flags laid over them.

    Raises:
        UnknownNameError: for a flag of an SAE that is not in the file's section saes.
        InputError: as for `_over`.
    """
    found, saes = _over(given, flags), given.get("saes") or {}
    for name, section in (flags.get("saes") or {}).items() if saes else ():
        if name not in saes:
            raise unknown_name("SAE of the file's section saes:", name, saes)
        found["saes"][name] = _over({"sae": saes[name] or {}}, {"sae": section or {}}, f"saes.{name}.")["sae"]
    return found


def _over_preset(preset: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an SAE over those of a preset that apply to its architecture."""
    whole = _over({"sae": preset}, {"sae": section})["sae"]
    name = whole.get("architecture", SAESettings.architecture)
    if not isinstance(name, str) or name not in architectures:
        return whole  # refused later, with a better message
    sae_class = architectures[name]
    variants = {each.name for each in fields(sae_class.objective_class)}
    known = {each.name for each in fields(SAESettings)} | set(setting_names(sae_class))
    if not sae_class.objective_class.penalises:
        known.discard("sparsity_coefficient")
    kept = {key: value for key, value in preset.items() if key in known}
    if "objective" in kept:
        kept["objective"] = {key: value for key, value in kept["objective"].items() if key in variants}
    return _over({"sae": kept}, {"sae": section})["sae"]


def _at_home(config: RunConfig) -> RunConfig:
    """Return a run with ~ expanded, which would otherwise be another folder for everyone who reads the run."""
    if not config.output_dir:
        raise InputError("output_dir is empty; expected a folder.")
    data, model, files = config.data, config.model, config.data.files
    found = _home(files) if isinstance(files, str) else None if files is None else [_home(each) for each in files]
    shards = None if data.shards is None else _home(data.shards)
    held_out = None if data.held_out is None else _home(data.held_out)
    return dataclasses.replace(
        config,
        output_dir=_home(config.output_dir),
        data=dataclasses.replace(data, files=found, shards=shards, held_out=held_out),
        model=None if model is None else dataclasses.replace(model, name=_home(model.name)),
    )


def _home(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise InputError(f"Given {path!r}, but there is no such home folder ({error}).") from error


def _preset(name: Any) -> dict[str, Any]:
    """Return the settings of a preset."""
    return presets[str(name)].settings if name is not None else {}


def _settle_remedy(explicit: Mapping[str, Any], preset: dict[str, Any]) -> None:
    """Raise for a given setting of another remedy than the chosen one; drop such settings of the preset."""
    chosen = read_value(
        str | None,
        explicit.get("training.dead_latent_remedy", preset.get("dead_latent_remedy", "resample")),
        "training.dead_latent_remedy",
    )
    if chosen is not None and chosen not in remedies:
        raise unknown_name("training.dead_latent_remedy", chosen, remedies)
    for remedy, names in OF_REMEDIES.items():
        for name in names if remedy != chosen else ():
            if f"training.{name}" in explicit:
                raise InputError(
                    f"training.{name} belongs to training.dead_latent_remedy: {remedy}, and the remedy is "
                    f"{chosen or 'null'}: remove one of them."
                )
            preset.pop(name, None)


def _check_data(data: DataSettings, explicit: Mapping[str, Any]) -> None:
    """Raise unless there is one source, with settings of that source."""
    chosen = [name for name in SOURCES if getattr(data, name) is not None]
    if len(chosen) != 1:
        given = " and ".join(f"data.{name}" for name in chosen) or "none"
        raise InputError(f"Activations come from one of data.dataset, data.files and data.shards; given {given}.")
    if data.dataset is not None and Path(data.dataset).is_file():
        raise InputError(f"data.dataset is {data.dataset}, a file and not a Hub id: give it as data.files.")
    for name, least in (("sequences_per_batch", 1), ("held_out_tokens", 0), ("context_length", 1)):
        value = getattr(data, name)
        if value is not None and value < least:
            raise InputError(f"data.{name} is {value}; expected at least {least}.")
    if data.held_out is not None and data.held_out_tokens == 0:
        raise InputError("data.held_out names text to measure, and data.held_out_tokens is 0: remove one of them.")
    for name in _foreign(data):
        if f"data.{name}" in explicit:
            what = "" if name in FOREIGN[chosen[0]] else f": {data.name}"
            raise InputError(f"data.{name} means nothing with data.{chosen[0]}{what}: remove it.")


def _foreign(data: DataSettings) -> tuple[str, ...]:
    """Return the settings of the data that do not apply to its source."""
    source = next(name for name in SOURCES if getattr(data, name) is not None)
    given = data.files or []
    kinds = {kind_of(Path(each)) for each in ([given] if isinstance(given, str) else given)}
    if kinds & set(BUILDERS.values()):
        of_files: tuple[str, ...] = ("documents",)
    else:  # files without a known ending that are named one by one are plain text
        unknown = isinstance(given, str) or any(set("*?[") & set(each) for each in given)
        of_files = () if None in kinds and unknown else ("text_column",)
    return FOREIGN[source] + (of_files if source == "files" else ())


def _checked_saes(config: RunConfig) -> RunConfig:
    """Return a run whose SAEs have settings of the types that their architectures expect; errors as `_check_sae`."""
    checked = {}
    for name, sae in config.named.items():
        place = f"saes.{name}." if name else "sae."
        _check_sae(sae, place)
        checked[name] = dataclasses.replace(sae, settings=settings_of(sae, place))
    if config.saes:
        return dataclasses.replace(config, saes=checked)
    return dataclasses.replace(config, sae=checked[""])


def _check_sae(sae: SAESettings, place: str) -> None:
    """Raise if an SAE has settings that its architecture does not know."""
    if sae.architecture not in architectures:
        raise unknown_name(f"{place}architecture", sae.architecture, architectures)
    sae_class = architectures[sae.architecture]
    if not sae_class.one_site or not sae_class.per_token:
        raise InputError(
            f"{place}architecture is {sae.architecture!r}, which reads several sites, or several tokens, at once, and "
            "the stream gives single activations: choose another."
        )
    known = setting_names(sae_class)
    for name in sae.settings:
        if name in known:
            continue
        others = [other for other, model in architectures.items() if name in setting_names(model)]
        if others:
            raise InputError(
                f"{place}{name} is a setting of {', '.join(others)}, and this SAE is {sae.architecture}: remove it, "
                f"or change {place}architecture."
            )
        if name in DECIDED_BY_THE_RUN:
            raise InputError(f"{place}{name} follows from the rest of the run and cannot be given.")
        raise unknown_key(name, place, [each.name for each in fields(SAESettings) if not each.metadata] + known)
    if sae.sparsity_coefficient is not None and not sae_class.objective_class.penalises:
        raise InputError(
            f"{place}sparsity_coefficient means nothing to a {sae.architecture} SAE, which is sparse by construction: "
            "remove it."
        )
    if sae.site is None:
        raise InputError(f"{place}site is missing: give the site that the SAE reads, such as resid_post.6.")
    if sae.site_out == sae.site:
        raise InputError(
            f"{place}site_out is {sae.site_out}, the site that it reads: remove it, or give another site for a "
            "transcoder."
        )
    if sae.dtype not in DTYPES:
        raise InputError(f"{place}dtype is {sae.dtype!r}; expected {' or '.join(DTYPES)}.")
    if sae.d_sae is None and sae.expansion_factor is None:
        raise InputError(f"{place}d_sae is missing: give the number of latents, or {place}expansion_factor.")
    variants = [each.name for each in fields(sae_class.objective_class)]
    for name in sae.objective:
        if name not in variants:
            raise unknown_key(name, f"{place}objective.", variants)


def settings_of(sae: SAESettings, place: str = "sae.") -> dict[str, Any]:
    """Return an SAE's own settings with values of the types that its configuration has.

    Args:
        sae: the SAE.
        place: where it stands, for errors.
    """
    own = architectures[sae.architecture].config_class.own_fields()
    hints = {name: Union[kinds] for name, kinds in own.items()}  # noqa: UP007  # any of them
    return {name: read_value(hints[name], value, f"{place}{name}") for name, value in sae.settings.items()}


def _read_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's arguments with values of their types, and shares of the run as steps."""
    hints = hints_of(SAETrainingArguments)
    found: dict[str, Any] = {}
    steps = read_value(int, training.get("max_steps", SAETrainingArguments.max_steps), "training.max_steps")
    for name, value in training.items():
        if name in ELSEWHERE:
            raise InputError(f"training.{name} is given as {ELSEWHERE[name]}: remove it.")
        if name.startswith("hub_"):
            raise InputError(f"training.{name} means nothing: training publishes nothing. Remove it.")
        if name not in hints:
            raise unknown_key(name, "training.", list(hints))
        found[name] = read_value(hints[name], _steps(value, steps, f"training.{name}"), f"training.{name}")
    return found


def _steps(value: Any, steps: int, place: str) -> Any:
    """Return a value with shares such as ``5%`` in it as numbers of steps."""
    if isinstance(value, Mapping):
        return {name: _steps(each, steps, f"{place}.{name}") for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_steps(each, steps, place) for each in value]
    share = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if share is None:
        return value
    if float(share[1]) > 100:
        raise InputError(f"{place} is {value} of the {steps} steps of training; expected at most 100%.")
    return round(float(share[1]) / 100 * steps)
