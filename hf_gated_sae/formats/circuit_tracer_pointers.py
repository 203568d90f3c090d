"""Sets of transcoders for circuit-tracer without weights: a ``config.yaml`` points to every transcoder on the Hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
import yaml

from ..errors import CheckpointError, MissingFileError, SAEError, shown
from ..hub.base_model_norms import normalization_of
from ..hub.hook_names import site_of_hook
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ..storage import TENSOR_FILES
from ._config_values import one_of, text
from .base import CheckpointFormat, Example, formats
from .circuit_tracer import CONFIG, named_layer, site_fields
from .gemma_scope import FILE as GEMMA_SCOPE_FILE
from .gemma_scope_2 import FILE as GEMMA_SCOPE_2_FILE
from .gemma_scope_2 import write_tensors
from .gemma_scope_2_cross_layer import write_layers

KINDS = ("transcoder_set", "cross_layer_transcoder")
HOOKS = ("feature_input_hook", "feature_output_hook")
LARGEST_SET = 1000

_URI = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<at>[^/?]+))?/(?P<path>[^?]+?)(?:\?revision=(?P<query>[^&]+))?"
)


class Pointer(NamedTuple):
    """A file on the Hub.

    Attributes:
        repo: ``owner/name``.
        path: the file's path there.
        revision: branch, tag or commit; None for the newest.
    """

    repo: str
    path: str
    revision: str | None


class CircuitTracerPointersFormat(CheckpointFormat):
    """Written for circuit-tracer: a ``config.yaml`` whose ``transcoders`` list ``hf://owner/name[@revision]/path``.

    There is one entry per layer. In a ``transcoder_set`` the transcoder of layer L has the address ``folder/layer_L``;
    a ``cross_layer_transcoder`` has the folder's. The files are read by their own format, from their own repository,
    pinned to a commit; base model and hook points are those of the set's configuration.

    Source: safety-research/circuit-tracer; mntss and mwhanna on the Hub.
    """

    name: ClassVar[str] = "circuit_tracer_pointers"
    files = (CONFIG,)

    def addresses(self, location: Location) -> list[str]:
        """Return the addresses of the transcoders to which the configurations without weights point."""
        found = []
        for name in location.files:
            folder, _, file = name.rpartition("/")
            if file != CONFIG:
                continue
            here = location.at("/".join(part for part in (location.subfolder, folder) if part))
            if _has_weights(here):
                continue
            try:
                pointers, whole = _pointers(here)
            except SAEError:  # another library's, or broken; opening it raises the reason
                continue
            names = [""] if whole else [f"layer_{layer}" for layer in range(len(pointers))]
            found += ["/".join(part for part in (folder, name) if part) for name in names]
        return found

    def claims(self, location: Location) -> bool:
        """Whether the configuration points to a cross-layer transcoder, or that of the folder above to this layer."""
        if location.file is not None:
            return False
        named = named_layer(location)
        folder, layer = named or (location, None)
        if CONFIG not in folder or _has_weights(folder) or not _has_pointers(folder):
            return False
        pointers, whole = _pointers(folder)
        return bool(pointers) and (whole if layer is None else not whole and layer < len(pointers))

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Open the transcoder to which the set points, with base model and hook points of the set's configuration.

        Raises:
            CheckpointError: if it is in no known format, or not of the kind in the configuration.
            MissingFileError: if it cannot be reached.
        """
        folder, layer = named_layer(location) or (location, None)
        pointers, _ = _pointers(folder)
        pointer = pointers[layer or 0]
        root = folder.sibling(pointer.repo, pointer.revision)
        if layer is None and any(_folder(other) != _folder(pointer) for other in pointers):
            raise CheckpointError(
                f"{CONFIG} of {folder} names files of one cross-layer transcoder in several folders; expected one."
            )
        pointed = _pointed(root, pointer, layer is None, variant)
        config = folder.read_yaml(CONFIG)
        settings = {**pointed.config.to_dict(), **_facts(folder, config, layer, pointed)}
        target = pointed.origin
        at = f"@{target.revision}" if target.revision else ""
        prefix = target.subfolder if root.at(target.subfolder).file is None else target.subfolder.rpartition("/")[0]
        files = [f"hf://{pointer.repo}{at}/" + f"{prefix}/{file}".lstrip("/") for file in target.files]
        origin = replace(location.origin(self.name, [CONFIG, *files]), folder=None)
        return replace(pointed, config=type(pointed.config).from_dict(settings), origin=origin)

    def examples(self, root: Path) -> list[Example]:
        """Write sets that point to transcoders of Gemma Scope, and to single and cross-layer ones of Gemma Scope 2."""
        return write_examples(root)


def _folder(pointer: Pointer) -> tuple[str, str, str | None]:
    return pointer.repo, pointer.path.rpartition("/")[0], pointer.revision


def _has_weights(folder: Location) -> bool:
    """Whether a folder has weights of its own, to which its configuration then refers."""
    return any(name.endswith(tuple(TENSOR_FILES)) for name in folder.files if "/" not in name)


def _has_pointers(folder: Location) -> bool:
    """Whether a configuration has a list of transcoders; its entries are checked later."""
    return isinstance(folder.read_yaml(CONFIG).get("transcoders"), list)


def _pointers(folder: Location) -> tuple[list[Pointer], bool]:
    """Return the files that a configuration lists, by layer, and whether they are one cross-layer transcoder.

    Raises:
        CheckpointError: if an entry is not a pointer to a tensor file.
    """
    config, where = folder.read_yaml(CONFIG), f"{CONFIG} of {folder}"
    listed = config.get("transcoders")
    if not isinstance(listed, list) or not 1 <= len(listed) <= LARGEST_SET:
        raise CheckpointError(f"{where} has no list of transcoders; expected hf://owner/name/path for every layer.")
    pointers = []
    for entry in listed:
        match = _URI.fullmatch(entry) if isinstance(entry, str) and len(entry) < 1000 else None
        if match is None or not match["path"].endswith(tuple(TENSOR_FILES)):
            raise CheckpointError(
                f"{where} names the transcoder {shown(entry, 120)}; expected hf://owner/name/path of a tensor file, "
                "or hf://owner/name@revision/path."
            )
        revision = match["at"] or match["query"]
        pointers.append(Pointer(match["repo"], match["path"], unquote(revision) if revision else None))
    return pointers, one_of(config, "model_kind", where, KINDS, KINDS[0]) == KINDS[1]


def _pointed(root: Location, pointer: Pointer, whole: bool, variant: str | None) -> Checkpoint:
    """Open the file of a pointer, or its folder, with the one format that claims it.

    Raises:
        CheckpointError: if no format claims it, or several do.
        MissingFileError: if the file does not exist.
    """
    if pointer.path not in root:
        raise MissingFileError(f"There is no {pointer.path} in {root}, which a set of transcoders points to.")
    others = [layout for name, layout in formats.items() if name != CircuitTracerPointersFormat.name]
    folder = pointer.path.rpartition("/")[0]
    for target in (root.at(folder),) if whole else (root.at(pointer.path), root.at(folder)):
        claims = [layout for layout in others if layout.claims(target)]
        if len(claims) == 1:
            return claims[0].open(target, variant=variant)
    raise CheckpointError(
        f"A set of transcoders points to {pointer.path} of {root}, which is not an SAE in a known format."
    )


def _facts(folder: Location, config: dict[str, Any], layer: int | None, pointed: Checkpoint) -> dict[str, Any]:
    """Return base model and sites from the set's configuration.

    Raises:
        CheckpointError: if the set declares a cross-layer transcoder and the files are not one.
    """
    where = f"{CONFIG} of {folder}"
    facts: dict[str, Any] = {}
    if (model := text(config, "model_name", where, None)) is not None:
        facts["base_model"] = repository_of(model)
    base_model = facts.get("base_model", pointed.config.base_model)
    hooks = [text(config, key, where, None) for key in HOOKS]
    if layer is not None:
        read, written = hooks
        # Sets for nnsight have other keys for the hook points; then the transcoder's own sites are used.
        return (
            facts
            if read is None or written is None
            else {**facts, **site_fields(read, written, layer, base_model, where)}
        )
    stored: Any = pointed.config
    for key, hook, name in zip(HOOKS, hooks, ("sites", "sites_out"), strict=True):
        sites = getattr(stored, name, None)
        if sites is None:
            raise CheckpointError(
                f"{where} has model_kind {KINDS[1]}, but points to {pointed}, which is not one; expected {KINDS[0]}, "
                "or pointers to a cross-layer transcoder."
            )
        if hook is not None:
            named = [site_of_hook(hook, block, base_model) for block in range(len(sites))]
            facts[name] = [site for site, _ in named]
            if key == HOOKS[0]:
                facts |= normalization_of(named[0][1], base_model, hook, where)
    return facts


def write_examples(root: Path) -> list[Example]:
    """Write the examples: a configuration each, and the repositories to which they point."""
    generator = torch.Generator().manual_seed(6)
    raw = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    gained = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    first, second, whole = (
        "google/gemma-scope-2b-pt-transcoders",
        "google/gemma-scope-2-1b-pt",
        "clt/width_262k_l0_medium",
    )
    folders = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer, l0 in enumerate((76, 65))]
    numbers = np.random.default_rng(6)
    for folder in folders:
        (root / first / folder).mkdir(parents=True, exist_ok=True)
        shapes = {"W_enc": (7, 16), "W_dec": (16, 7), "b_enc": (16,), "b_dec": (7,)}
        arrays: Any = {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        np.savez(root / first / folder / GEMMA_SCOPE_FILE, **arrays, threshold=np.full(16, 0.2, np.float32))
    deep = [f"transcoder_all/layer_{layer}_width_16k_l0_small_affine" for layer in range(2)]
    for folder in deep:
        write_tensors(root / second / folder, 7, 16, 7, generator, affine=True)
    (root / second / whole).mkdir(parents=True, exist_ok=True)
    write_layers(root / second / whole, 3, False, generator)
    sets: list[tuple[str, str, dict[str, Any]]] = [
        ("mntss/gemma-scope-transcoders", "", {"model_name": "google/gemma-2-2b", **raw, "transcoders":
            [f"hf://{first}/{folder}/{GEMMA_SCOPE_FILE}" for folder in folders]}),
        ("mwhanna/gemma-scope-2-1b-pt", "transcoder_all/width_16k_l0_small_affine", {"model_name":
            "google/gemma-3-1b-pt", **gained, "transcoders":
            [f"hf://{second}/{folder}/{GEMMA_SCOPE_2_FILE}" for folder in deep]}),
        ("mwhanna/gemma-scope-2-1b-pt", whole, {"model_name": "google/gemma-3-1b-pt", **gained, "model_kind": KINDS[1],
            "transcoders": [f"hf://{second}/{whole}/params_layer_{layer}.safetensors" for layer in range(3)]}),
    ]  # fmt: skip
    for repo, subfolder, config in sets:
        folder_here = root / repo / subfolder
        folder_here.mkdir(parents=True, exist_ok=True)
        (folder_here / CONFIG).write_text(yaml.safe_dump({"model_kind": KINDS[0], **config}))
    return [
        Example(sets[0][0], "layer_0"),
        Example(sets[0][0], "layer_1"),
        Example(sets[1][0], f"{sets[1][1]}/layer_1"),
        Example(sets[2][0], sets[2][1]),
    ]
