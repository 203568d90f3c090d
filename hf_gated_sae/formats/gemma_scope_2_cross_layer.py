"""Gemma Scope 2's cross-layer transcoders and weakly causal crosscoders for Gemma 3."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError, MissingFileError
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ._config_values import text
from ._folders import folders_with
from ._layer_files import Layer, cross_layer_checkpoint
from ._module_paths import site_of_path
from ._tensor_names import renamed
from .base import CheckpointFormat, Example
from .circuit_tracer import named_layer
from .gemma_scope_2 import AFFINE, ARCHITECTURE, CONFIG, TENSORS, base_model_of, model_of

NAMES = {"encoder": "w_enc.T", "decoder": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}

FIRST = "params_layer_0.safetensors"
_FILE = re.compile(r"params_layer_(\d{1,4})\.safetensors")
_CROSSCODER = re.compile(r"crosscoder[^/]*/layer_(\d+(?:_\d+)*)_width_")
_TRANSCODER = re.compile(r"clt[^/]*/width_")


class GemmaScope2CrossLayerFormat(CheckpointFormat):
    """Written by Google DeepMind: one ``params_layer_I.safetensors`` per source site; some with a ``config.json``.

    ``clt/width_W_l0_N[_affine]/`` reads every MLP's input after the norm's gain and writes every MLP's output;
    ``crosscoder/layer_A_B_C_D_width_W_l0_N/`` reads and writes the stream after four blocks. The second axis of
    ``w_dec [latents, n_sites, d_out]`` has all outputs; those before the source site are zero in training and are not
    read. ``_affine`` ones add ``x_m @ affine_skip_connection_m``.

    The folder is the address of the whole. ``params_layer_I.safetensors``, or ``layer_I`` in the folder, is that of
    one source site's latents: an SAE that reads one site and writes its share of the outputs from I on, with ``b_dec``
    and the skip connection of output I, so that the source sites add up to the whole.

    Source: google/gemma-scope-2-* on the Hub, and its tutorial.
    """

    name: ClassVar[str] = "gemma_scope_2_cross_layer"
    files = ("params_layer_*.safetensors",)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with a ``params_layer_0.safetensors``, and the files of their layers."""
        folders = folders_with(location, FIRST)
        files = [name for name in location.files if _FILE.fullmatch(name.rpartition("/")[2])]
        return folders + [name for name in files if name.rpartition("/")[0] in folders]

    def claims(self, location: Location) -> bool:
        """Whether there is a file of the first layer, and one of the address's layer with Gemma Scope 2's tensors."""
        folder, layer = _folder_and_layer(location)
        if location.file is not None and layer is None:
            return False
        file = f"params_layer_{layer or 0}.safetensors"
        return FIRST in folder and file in folder and set(folder.content(file)) - {AFFINE} == TENSORS

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the headers, sites from the names of folder and files.

        Raises:
            CheckpointError: if the files do not fit together, or not to the folder's name.
            MissingFileError: if a layer between others is missing.
        """
        folder, layer = _folder_and_layer(location)
        everything = layer_files(folder, _FILE)
        first, files = (0, everything) if layer is None else (layer, everything[layer : layer + 1])
        layers: list[Layer] = []
        for file in files:
            held = folder.tensors(file)
            names = {**NAMES, "skip": f"{AFFINE}.T"} if AFFINE in held else NAMES
            layers.append(renamed(held, names, f"{file} of {folder}"))
        described = folder.read_json(CONFIG) if CONFIG in folder else {}
        where = f"{CONFIG} of {folder}"
        if (architecture := text(described, "architecture", where, ARCHITECTURE)) != ARCHITECTURE:
            raise CheckpointError(f"{where} has architecture {architecture[:60]!r}; expected {ARCHITECTURE!r}.")
        model = text(described, "model_name", where, None)
        sites, sites_out = _sites(folder, len(everything), described)
        return cross_layer_checkpoint(
            layers,
            location.origin(self.name, [*files, CONFIG] if described else files),
            sites_out[first:],
            absolute=True,
            before=first,
            sites=sites[first : first + len(files)],
            base_model=model_of(model) if model else base_model_of(location.repo_id),
        )

    def examples(self, root: Path) -> list[Example]:
        """Write transcoders, with and without skip connection and configuration, and a crosscoder."""
        transcoder = {
            "hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.0.post_feedforward_layernorm.output",
        }
        made: list[tuple[str, str, dict[str, str]]] = [
            ("google/gemma-scope-2-1b-pt", "clt/width_262k_l0_medium", {}),
            ("google/gemma-scope-2-270m-it", "clt/width_262k_l0_big_affine", transcoder),
            ("google/gemma-scope-2-1b-it", "crosscoder/layer_1_2_4_5_width_65k_l0_medium", {}),
        ]
        generator = torch.Generator().manual_seed(3)
        examples = []
        for repo, address, hooks in made:
            example = Example(repo, address)
            folder = root / repo / address
            folder.mkdir(parents=True, exist_ok=True)
            write_layers(folder, 4 if "crosscoder" in address else 3, "affine" in address, generator)
            if hooks:
                more = {"architecture": ARCHITECTURE, "model_name": "gemma-v3-270m-it", "type": "clt"}
                (folder / CONFIG).write_text(json.dumps({**hooks, **more}))
            examples.append(example)
        layer = "params_layer_1.safetensors"
        return [*(Example(each.repo, f"{each.address}/{layer}") for each in examples), *examples]


def layer_files(location: Location, pattern: re.Pattern[str]) -> list[str]:
    """Return the files of all layers directly in a folder, by number.

    Raises:
        MissingFileError: if there is a gap.
    """
    found = {int(match[1]): name for name in location.files if (match := pattern.fullmatch(name))}
    if missing := [number for number in range(len(found)) if number not in found]:
        raise MissingFileError(
            f"{location} has {len(found)} files of layers, but none of layer {missing[0]}: it has "
            f"{location.listing()}. Expected all from 0 on; fetch it again."
        )
    return [found[number] for number in range(len(found))]


def _folder_and_layer(location: Location) -> tuple[Location, int | None]:
    """Return the folder, and the layer of the address; None for the whole."""
    if location.file is not None and (match := _FILE.fullmatch(location.file)):
        return location.at(location.subfolder), int(match[1])
    return named_layer(location) or (location, None)


def _sites(location: Location, number: int, described: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the sites that are read and written, from the folder's name.

    Raises:
        CheckpointError: if the folder has another name, or the name has another number of sites.
    """
    where = f"{CONFIG} of {location}"
    crosscoder = _CROSSCODER.search(location.address)
    if crosscoder is None and _TRANSCODER.search(location.address) is None:
        raise CheckpointError(
            f"The sites of {location} are read from the name of its folder; expected 'clt/width_...' or "
            "'crosscoder/layer_..._width_...': keep the names that it has on the Hub."
        )
    blocks = [int(block) for block in crosscoder[1].split("_")] if crosscoder else list(range(number))
    if len(blocks) != number:
        raise CheckpointError(
            f"{location} names {len(blocks)} layers and has {number} files of layers; expected one file per layer: "
            "fetch it again."
        )
    kinds = ("resid_post", "resid_post") if crosscoder else ("mlp_in", "mlp_out")
    for key, kind in zip(("hf_hook_point_in", "hf_hook_point_out"), kinds, strict=True):
        stated = text(described, key, where, None)
        if stated is not None and site_of_path(stated).rpartition(".")[0] != kind:
            raise CheckpointError(
                f"{where} has {key} = {stated[:120]!r}, but its folder's name implies {kind}: correct one of them."
            )
    read, written = kinds
    return [f"{read}.{block}" for block in blocks], [f"{written}.{block}" for block in blocks]


def write_layers(folder: Path, sites: int, affine: bool, generator: torch.Generator) -> None:
    """Write the files of all layers."""
    d = 8
    for site in range(sites):
        s = 10 + site
        shapes: dict[str, tuple[int, ...]] = {"w_enc": (d, s), "w_dec": (s, sites, d), "b_enc": (s,), "b_dec": (d,)}
        if affine:
            shapes[AFFINE] = (d, d)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors["w_dec"][:, :site] = 0  # training keeps them at zero
        tensors["threshold"] = 0.1 + torch.rand(s, generator=generator)
        save_file(tensors, folder / f"params_layer_{site}.safetensors")
