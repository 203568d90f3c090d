"""Cross-layer transcoders in the layout of circuit-tracer, two files per layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from safetensors.torch import save_file

from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ._config_values import text
from ._layer_files import Layer, cross_layer_checkpoint
from ._tensor_names import renamed
from .base import CheckpointFormat, Example
from .circuit_tracer import CONFIG, named_layer, site_fields
from .gemma_scope_2_cross_layer import layer_files

_ENCODER = re.compile(r"W_enc_(\d{1,4})\.safetensors")
_DECODER = re.compile(r"W_dec_(\d{1,4})\.safetensors")


class CircuitTracerCLTFormat(CheckpointFormat):
    """Written for circuit-tracer: ``W_enc_L.safetensors`` and ``W_dec_L.safetensors`` per layer, and ``config.yaml``.

    ``W_enc_L [d_sae, d_in]`` is the encoder. ``W_dec_L [d_sae, layers - L, d]`` is the decoder; its second axis starts
    at the layer's own output. The encoder's file also has ``b_enc_L``, the bias ``b_dec_L`` of the layer's output and
    optionally ``threshold_L``. The configuration names base model and hook points. The folder is the address of the
    whole transcoder. ``W_enc_L.safetensors``, or ``layer_L``, is the address of one layer's latents: an SAE that reads
    one site and writes its share of the outputs from L on, with ``b_dec_L``, so that the layers add up to the whole.

    Source: safety-research/circuit-tracer; mntss/clt-* on the Hub.
    """

    name: ClassVar[str] = "circuit_tracer_clt"
    files = ("W_enc_*.safetensors", "W_dec_*.safetensors")

    def addresses(self, location: Location) -> list[str]:
        """Return the folders of cross-layer transcoders, and the encoder files of their layers."""
        files = [name for name in location.files if _ENCODER.fullmatch(name.rpartition("/")[2])]
        return sorted({name.rpartition("/")[0] for name in files}) + files

    def claims(self, location: Location) -> bool:
        """Whether there are encoder and decoder files of layers, and the configuration."""
        folder, layer = _folder_and_layer(location)
        if location.file is not None and layer is None:
            return False
        needed = [CONFIG, *(f"W_{part}_{layer or 0}.safetensors" for part in ("enc", "dec"))]
        return all(name in folder for name in needed)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the headers, base model and sites from the configuration.

        Raises:
            CheckpointError: if files and configuration do not fit together.
            MissingFileError: if a layer between others, or a decoder, is missing.
        """
        folder, layer = _folder_and_layer(location)
        everything = range(len(layer_files(folder, _ENCODER)))
        layer_files(folder, _DECODER)
        wanted = everything if layer is None else range(layer, layer + 1)
        config, where = folder.read_yaml(CONFIG), f"{CONFIG} of {folder}"
        hooks = text(config, "feature_input_hook", where), text(config, "feature_output_hook", where)
        base_model = repository_of(text(config, "model_name", where))
        found = [site_fields(*hooks, block, base_model, where) for block in everything]
        read_as = {key: value for key, value in found[0].items() if key.startswith("normalization")}
        files = [f"W_{part}_{block}.safetensors" for block in wanted for part in ("enc", "dec")]
        return cross_layer_checkpoint(
            [_layer(folder, block) for block in wanted],
            location.origin(self.name, [CONFIG, *files]),
            [fields["site_out"] for fields in found[wanted[0] :]],
            absolute=False,
            sites=[found[block]["site"] for block in wanted],
            base_model=base_model,
            **read_as,
        )

    def examples(self, root: Path) -> list[Example]:
        """Write transcoders with ReLU and JumpReLU; some addresses are those of single layers."""
        raw = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
        made = [
            ("mntss/clt-gemma-2-2b-2.5M", "google/gemma-2-2b", False),
            ("mntss/clt-llama-3.2-1b-524k", "meta-llama/Llama-3.2-1B", True),
        ]
        generator = torch.Generator().manual_seed(5)
        for repo, model, has_threshold in made:
            folder = root / repo
            folder.mkdir(parents=True, exist_ok=True)
            config = {"model_name": model, "model_kind": "cross_layer_transcoder", **raw}
            (folder / CONFIG).write_text(yaml.safe_dump(config))
            _write_layers(folder, 3, has_threshold, generator)
        return [
            *(Example(repo) for repo, _, _ in made),
            *(Example(repo, "W_enc_1.safetensors") for repo, _, _ in made),
            Example(made[0][0], "W_enc_2.safetensors"),
        ]


def _folder_and_layer(location: Location) -> tuple[Location, int | None]:
    """Return the transcoder's folder, and the layer of the address; None for the whole transcoder."""
    if location.file is not None and (match := _ENCODER.fullmatch(location.file)):
        return location.at(location.subfolder), int(match[1])
    return named_layer(location) or (location, None)


def _layer(location: Location, layer: int) -> Layer:
    """Return the tensors of one layer, by parameter name."""
    parts: list[tuple[str, dict[str, str]]] = [
        (f"W_enc_{layer}.safetensors", {"encoder": "W_enc", "b_enc": "b_enc", "b_dec": "b_dec"}),
        (f"W_dec_{layer}.safetensors", {"decoder": "W_dec"}),
    ]
    tensors: dict[str, Any] = {}
    for file, names in parts:
        held = location.tensors(file)
        if f"threshold_{layer}" in held:
            names = {**names, "threshold": "threshold"}
        numbered = {name: f"{stored_name}_{layer}" for name, stored_name in names.items()}
        tensors |= renamed(held, numbered, f"{file} of {location}")
    return tensors


def _write_layers(folder: Path, layers: int, has_threshold: bool, generator: torch.Generator) -> None:
    """Write the files of all layers, in bfloat16 like the real ones."""
    d = 8
    for layer in range(layers):
        s = 10 + layer

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        encoder = {f"W_enc_{layer}": random(s, d), f"b_enc_{layer}": random(s), f"b_dec_{layer}": random(d)}
        if has_threshold:
            encoder[f"threshold_{layer}"] = (0.1 + torch.rand(s, generator=generator)).bfloat16()
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": random(s, layers - layer, d)}, folder / f"W_dec_{layer}.safetensors")
