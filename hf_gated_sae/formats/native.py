"""This library's own layout, that of any transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from transformers import CONFIG_MAPPING

from ..auto import model_type_of
from ..errors import CheckpointError, MissingFileError, SAEError, did_you_mean, shown
from ..hub.location import Location
from ..modeling import architectures
from ..modeling.checkpoint import Checkpoint
from ..storage import StoredTensor
from ..storage.atomic_write import FACTS_FILE as FACTS
from .base import CheckpointFormat, Example

CONFIG = "config.json"


class NativeFormat(CheckpointFormat):
    """Written by this library: ``config.json`` with one of its model types, and ``model.safetensors``.

    The weights may be in shards with an index. A ``sae_metrics.json`` with measurements beside them is fetched, too.
    """

    name: ClassVar[str] = "native"

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with a ``config.json`` and a ``model*.safetensors``."""
        return native_folders(location.files)

    def claims(self, location: Location) -> bool:
        """Whether ``config.json`` has one of this library's model types, and a width, which other libraries lack."""
        if location.file is not None or CONFIG not in location or _architecture(location) not in architectures:
            return False
        return bool({"d_in", "d_sae"} & set(location.read_json(CONFIG)))

    def near_miss(self, location: Location) -> str | None:
        """Return why a ``config.json`` of another kind of model is not claimed."""
        if CONFIG not in location:
            return None
        model_type = location.read_json(CONFIG).get("model_type")
        known = [model_type_of(name) for name in architectures]
        if model_type is None:
            return f"Its {CONFIG} has no model_type; expected one of {', '.join(known)}."
        if not isinstance(model_type, str):
            return f"Its {CONFIG} has model_type {shown(model_type)}, which is unknown. Known: {', '.join(known)}."
        close = did_you_mean(model_type, known, most=1)
        if not close and model_type in CONFIG_MAPPING:
            return f"Its {CONFIG} has model_type {model_type!r}: that is a model of another kind, not an SAE."
        return f"Its {CONFIG} has model_type {model_type!r}, which is unknown.{close} Known: {', '.join(known)}."

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Fetch configuration, weights and facts.

        Raises:
            CheckpointError: if the configuration cannot be used, or the index of the shards is broken.
            MissingFileError: if weights are missing.
        """
        model_class = architectures[_architecture(location)]
        try:
            config = model_class.config_class.from_dict(location.read_json(CONFIG))
        except SAEError as error:
            raise CheckpointError(f"The {CONFIG} of {location} cannot be used: {error}") from error
        weights = _weights(location, variant)
        stored = _tensors(location, weights)
        facts = [FACTS] if FACTS in location else []
        origin = replace(
            location.origin(self.name, [CONFIG, *weights, *facts]), folder=location.fetch([CONFIG, *facts])
        )
        return Checkpoint(model_class, config, origin, stored, shared=model_class.shared_names(config))

    def examples(self, root: Path) -> list[Example]:
        """Write one SAE of every architecture."""
        written = []
        for name, model_class in architectures.items():
            folder = root / "acme" / "native-saes" / name
            few = {"k": 3} if "k" in model_class.config_class.own_fields() else {}
            model_class(model_class.config_class(d_in=6, d_sae=16, site="resid_post.1", **few)).save_pretrained(folder)
            written.append(Example("acme/native-saes", name))
        return written


def native_folders(files: Iterable[str]) -> list[str]:
    """Return the folders in a listing that have a ``config.json`` and a ``model*.safetensors``."""
    paths = [PurePosixPath(file) for file in files]
    described = {path.parent for path in paths if path.name == CONFIG}
    weighted = {path.parent for path in paths if path.match("model*.safetensors")}
    return sorted("" if str(folder) == "." else str(folder) for folder in described & weighted)


def _architecture(location: Location) -> str:
    """Return the architecture in ``config.json``; empty if it has none."""
    model_type = location.read_json(CONFIG).get("model_type")
    return model_type.removesuffix("_sae") if isinstance(model_type, str) and model_type.endswith("_sae") else ""


def _weights(location: Location, variant: str | None) -> list[str]:
    """Return the files of the weights, the index first.

    Raises:
        CheckpointError: if there are two sets of weights, or the index names no files.
        MissingFileError: if there are no weights.
    """
    whole = f"model.{variant}.safetensors" if variant else "model.safetensors"
    index = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
    if whole in location and index in location:
        raise CheckpointError(f"{location} holds both {whole} and {index}; expected one set of weights: remove one.")
    if whole in location:
        return [whole]
    if index not in location:
        raise MissingFileError(
            f"There is no {whole} in {location}. It has {location.listing()}; expected the weights as safetensors: "
            "save the SAE again with save_pretrained."
        )
    shards = location.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} of {location} has no weight_map from tensors to files: save the SAE again.")
    return [index, *sorted(set(shards.values()))]


def _tensors(location: Location, weights: list[str]) -> dict[str, StoredTensor]:
    """Return every stored tensor.

    Raises:
        CheckpointError: if a file is broken, or the index and the files disagree.
    """
    found: dict[str, StoredTensor] = {}
    for name in weights:
        if name.endswith(".json"):
            continue
        tensors = location.tensors(name)
        if twice := sorted(set(tensors) & set(found)):
            raise CheckpointError(f"{location} holds {twice[0]} in two files: save the SAE again.")
        found |= tensors
    if weights[0].endswith(".json"):
        listed = set(location.read_json(weights[0])["weight_map"])
        if wrong := sorted(listed ^ set(found)):
            raise CheckpointError(
                f"{weights[0]} of {location} and the files disagree about {', '.join(wrong)}: save it again."
            )
    return found
