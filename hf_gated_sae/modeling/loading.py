"""Read a checkpoint that was found: all or some of its latents, with a configuration, in a dtype."""

from __future__ import annotations

import copy
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, InputError, LatentIndexError, did_you_mean, shown
from ..registry import LateBound
from .architecture_registry import architectures
from .building import assembled, chosen_dtype, largest, ordinary_tensors, require_complete, require_finite, unrecorded
from .checkpoint import Checkpoint, Tensors
from .description import CheckpointDescription
from .transformers_settings import quiet_transformers

if TYPE_CHECKING:
    from .config import SAEConfig
    from .model import SAEModel


COMPUTED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes of weights that can be computed with; 8-bit dtypes are for storage alone."""


# Arguments that say what a checkpoint is, and where; they are not needed once it was found.
OPENING_ARGUMENTS = ("format", "architecture", "names", "ignore")
PLACE_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "variant")

open_checkpoint = LateBound("hf_gated_sae.formats", "open_checkpoint")
_described_tensors = LateBound("hf_gated_sae.formats", "described_tensors")


def named_place(
    repo: str | os.PathLike[str] | None, subfolder: str, arguments: dict[str, Any]
) -> tuple[str | None, str]:
    """Return repository and subfolder, which SAELens calls ``release`` and ``sae_id``.

    Args:
        repo: the repository, if given.
        subfolder: the folder in it, or an empty string.
        arguments: the other arguments of `from_pretrained`; ``release`` and ``sae_id`` are removed from it.

    Raises:
        InputError: if one of them is given under both names.
    """
    release, sae_id = arguments.pop("release", None), arguments.pop("sae_id", None)
    for name, theirs, ours in (("release", release, repo), ("sae_id", sae_id, subfolder or None)):
        if theirs is not None and ours is not None:
            raise InputError(f"Given {name}={theirs!r} and {os.fspath(ours)!r} for the same argument: pass only one.")
    if sae_id is not None and repo is None and release is None:
        raise InputError(f"Given sae_id={sae_id!r} without release=; pass the release= that contains it as well.")
    place = repo if release is None else release
    return None if place is None else os.fspath(place), subfolder if sae_id is None else sae_id


def effective_config(
    checkpoint: Checkpoint, config: SAEConfig | None, arguments: Mapping[str, Any]
) -> tuple[SAEConfig, dict[str, Any]]:
    """Return the configuration to load with, and the arguments for transformers.

    Args:
        checkpoint: what is loaded.
        config: the configuration that the user gave, if any.
        arguments: the other arguments of `from_pretrained`, including keys of the configuration.

    Raises:
        CheckpointError: if neither the checkpoint nor the user gives a key that is needed.
        InputError: if the given configuration is of another architecture, or a given value cannot be used.
    """
    config_class = checkpoint.model_class.config_class
    settings = {name: value for name, value in arguments.items() if name not in PLACE_ARGUMENTS}
    latents = settings.pop("latents", None)
    if latents is not None:
        if not checkpoint.model_class.sliceable:
            raise InputError(
                f"{checkpoint} is a {checkpoint.model_class.__name__}, which cannot hold only some of its latents: "
                "load it without latents=."
            )
        settings["kept_latents"] = _existing(latents, checkpoint)
    given = {name: settings.pop(name) for name in config_class.own_fields() if name in settings}
    chosen = checkpoint.config if config is None else config
    if not isinstance(chosen, config_class):
        raise InputError(
            f"config= is a {type(chosen).__name__}, but {checkpoint} is a {checkpoint.model_class.__name__}: expected "
            f"a {config_class.__name__}."
        )
    # Always a copy: the dtype is written into it, and the user's own stays unchanged.
    made = config_class.from_dict({**chosen.to_dict(), **given}) if given else copy.copy(chosen)
    for name, why in checkpoint.unsaid.items():
        if getattr(made, name) is None:
            raise CheckpointError(why)
    return made, settings


def _existing(latents: Any, checkpoint: Checkpoint) -> list[int]:
    """Return the latent indices after checking that the SAE has them.

    Raises:
        InputError: if one is given twice, or is not a whole number.
        LatentIndexError: naming the first one that is out of range.
    """
    wanted, d_sae = _whole_numbers(latents), checkpoint.config.d_sae
    if outside := [latent for latent in wanted if not 0 <= latent < d_sae]:
        raise LatentIndexError(
            f"Latent {outside[0]} does not exist: {checkpoint} has d_sae = {d_sae} latents, 0 .. {d_sae - 1}."
        )
    if len(set(wanted)) < len(wanted):
        twice = next(latent for latent in wanted if wanted.count(latent) > 1)
        raise InputError(f"latents= names latent {twice} more than once; expected each once.")
    return wanted


def _whole_numbers(latents: Any) -> list[int]:
    """Return latent indices in the order in which they were given.

    Raises:
        InputError: if they are not whole numbers.
    """
    try:
        several = latents.tolist() if isinstance(latents, Tensor) else list(latents)
        if not any(isinstance(latent, (bool, str)) for latent in several):
            return [operator.index(latent) for latent in several]
    except TypeError:
        pass
    raise InputError(f"latents is {shown(latents)}; expected numbers of latents, such as [3, 7].")


@contextmanager
def explained(config_class: type[SAEConfig]) -> Iterator[None]:
    """Turn the TypeError that transformers raises for an unknown argument into an InputError."""
    try:
        yield
    except TypeError as error:
        unexpected = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unexpected is None:
            raise
        fields = list(config_class.own_fields())
        known = [
            *PLACE_ARGUMENTS,
            *OPENING_ARGUMENTS,
            *fields,
            *("subfolder", "latents", "config", "dtype", "device_map"),
        ]
        raise InputError(
            f"from_pretrained has no argument {unexpected[1]!r}.{did_you_mean(unexpected[1], known)} It takes the "
            f"arguments of transformers' from_pretrained, and the configuration's keys {', '.join(fields)}."
        ) from error


def require_headers(checkpoint: Checkpoint, config: SAEConfig) -> None:
    """Raise unless the stored tensors are those of the architecture, before any of them is read.

    Raises:
        CheckpointError: naming every tensor at fault.
    """
    for name, tensor in checkpoint.stored.items():
        if tensor.dtype not in COMPUTED:
            raise CheckpointError(
                f"The checkpoint {checkpoint} holds {name} as {tensor.dtype}; expected floating-point numbers of "
                "16, 32 or 64 bits: fetch or convert it again."
            )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in checkpoint.model_class(config).state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.shapes(config).items()}
    faults = {
        "missing_keys": set(expected) - set(stored) - set(_unrecorded(checkpoint, config)),
        "unexpected_keys": set(stored) - set(expected),
        "mismatched_keys": [
            (name, stored[name], expected[name])
            for name in set(stored) & set(expected)
            if stored[name] != expected[name]
        ],
    }
    require_complete(str(checkpoint), faults, list(expected))


def _unrecorded(checkpoint: Checkpoint, config: SAEConfig) -> Tensors:
    """Return zeros for the statistics that only our own layout has; nothing was recorded, and the config says so."""
    if checkpoint.origin.format == "native":
        return {}
    return unrecorded(config.rows)


def read_tensors(checkpoint: Checkpoint, config: SAEConfig, dtypes: Mapping[str, Any]) -> Tensors:
    """Return every tensor of the architecture, read from the checkpoint.

    Args:
        checkpoint: what was found.
        config: says which latents are held.
        dtypes: what `from_pretrained` was given as ``dtype`` or ``torch_dtype``, if anything.

    Raises:
        CheckpointError: if the tensors are not those of the architecture.
    """
    require_headers(checkpoint, config)
    wanted = [dtype for dtype in dtypes.values() if dtype not in (None, "auto")]
    dtype = chosen_dtype(dtypes, torch.float32) if wanted else None
    tensors = {**_unrecorded(checkpoint, config), **checkpoint.read(config, dtype)}
    if config.dtype is None:
        config.dtype = largest(tensors).dtype
    return tensors


def load(checkpoint: Checkpoint, config: SAEConfig | None, arguments: Mapping[str, Any]) -> tuple[SAEModel, Any]:
    """Read a checkpoint and build its SAE.

    Args:
        checkpoint: what was found.
        config: the configuration that the user gave, if any.
        arguments: the other arguments of `from_pretrained`.

    Returns:
        The SAE, and transformers' loading info.

    Raises:
        CheckpointError: if its tensors are not those of the architecture, or not finite.
        InputError: if an argument cannot be used.
    """
    config, settings = effective_config(checkpoint, config, arguments)
    with explained(checkpoint.model_class.config_class), ordinary_tensors():
        dtypes: dict[str, Any] = {name: settings[name] for name in ("dtype", "torch_dtype") if name in settings}
        tensors = read_tensors(checkpoint, config, dtypes)
        model, info = load_strictly(
            checkpoint.model_class, str(checkpoint), {**settings, "config": config, "state_dict": tensors}
        )
    model._origin = replace(
        checkpoint.origin, bytes_read=checkpoint.bytes_read(), cache_dir=arguments.get("cache_dir")
    )
    model.name_or_path = model.config.name_or_path = checkpoint.origin.repo
    return model, info


def from_tensors(
    cls: type[SAEModel],
    config: SAEConfig | None,
    description: CheckpointDescription | None,
    arguments: Mapping[str, Any],
) -> tuple[SAEModel, Any]:
    """Build an SAE from ``state_dict=``; statistics that are not among the tensors are zero.

    Args:
        cls: the class that `from_pretrained` was called on.
        config: its configuration; None if the tensors are described by `description`.
        description: the user's description of a home-made checkpoint's tensors, if any.
        arguments: the other arguments of `from_pretrained`.

    Returns:
        The SAE, and transformers' loading info.

    Raises:
        CheckpointError: if the tensors are not those of the architecture, or not finite.
        InputError: if an argument cannot be used, or one is missing.
    """
    settings = dict(arguments)
    if description is not None:
        if config is not None:
            raise InputError("Given both config= and architecture=; pass one, as config= includes the architecture.")
        config, settings["state_dict"] = _described_tensors(settings.get("state_dict"), description)
        settings = {name: value for name, value in settings.items() if name not in description.options}
    elif config is None:
        raise InputError(
            "Given neither a checkpoint nor config=; pass a repository id, a folder, or both config= (or "
            "architecture=) and state_dict=."
        )
    model_class = architectures[config.architecture]
    require_class(cls, model_class, "given configuration")
    with explained(model_class.config_class), ordinary_tensors():
        if isinstance(settings.get("state_dict"), Mapping):
            settings["state_dict"] = {**unrecorded(config.rows), **settings["state_dict"]}
        return load_strictly(model_class, "given as state_dict", {**settings, "config": config})


def require_class(wanted: type[SAEModel], found: type[SAEModel], what: str) -> None:
    """Raise unless what was found is of the class on which `from_pretrained` was called.

    Raises:
        CheckpointError: naming both.
    """
    if not issubclass(found, wanted):
        raise CheckpointError(
            f"The {what} is a {found.__name__}, not a {wanted.__name__}: load it with {found.__name__}."
            "from_pretrained or SAEModel.from_pretrained."
        )


def load_strictly(
    model_class: type[SAEModel], where: str, arguments: dict[str, Any]
) -> tuple[SAEModel, dict[str, Any]]:
    """Build an SAE around its tensors, and raise for everything that transformers would only warn about.

    transformers itself is called only for what it alone can do, such as quantising or dispatching, since it first
    prepares for the checkpoints of every model that it knows.
    """
    if set(arguments) <= {"config", "state_dict", "dtype", "torch_dtype"}:
        model, info = assembled(model_class, where, **arguments)
    else:
        from_pretrained = PreTrainedModel.from_pretrained.__func__  # that of SAEModel would call this function again
        with quiet_transformers():
            model, info = from_pretrained(
                model_class, None, output_loading_info=True, **{**arguments, "ignore_mismatched_sizes": True}
            )
        require_complete(where, info, list(model.state_dict()))
    require_finite(where, model)
    return model, info
