"""EleutherAI's sparsify: TopK SAEs and transcoders, one folder per module of the base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from ..architectures.abs_topk import AbsTopKSAE
from ..architectures.group_max import GroupMaxSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError
from ..hub.index import known_facts
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling import SAEModel
from ..modeling.checkpoint import Checkpoint
from ._config_values import flag, integer, one_of, text
from ._folders import folders_with
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, widths

CONFIG = "cfg.json"
FILE = "sae.safetensors"
RUN_CONFIG = "config.json"
NAMES = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
SKIP = "W_skip"
DEFAULT_K = 32

_SEED = re.compile(r"seed\d+")
_BLOCK = re.compile(r"(?:(?:model|decoder|language_model|text_model)\.)*(?:layers|h|blocks)\.(\d+)")
_EMBEDDING = re.compile(r"(?:\w+\.)*(?:embed_tokens|embed_in|wte)")


class SparsifyFormat(CheckpointFormat):
    """Written by EleutherAI's sparsify: ``<hookpoint>/sae.safetensors`` and ``<hookpoint>/cfg.json``.

    With several seeds the folders are ``<hookpoint>/seed<n>/``. The hookpoint is the path of a module inside the base
    model. An SAE reads the module's output. A transcoder (``transcode``) reads the module's input, writes its output,
    and does not subtract ``b_dec``. Input and output of a block are the residual stream; other modules are named by
    their path, as in some families the output of ``mlp`` is not what is added to the stream. An optional
    ``config.json`` at the root of the training run names the base model.

    Transcoders from before February 2025 have ``transcode`` in that file only, and do subtract ``b_dec``. ``signed``,
    of mid-2024, means that the k latents of largest magnitude are selected, with their sign. ``multi_topk`` and
    ``normalize_decoder`` only concern training. Missing keys have the library's defaults.

    Source: EleutherAI/sparsify, ``sparse_coder.py``, ``fused_encoder.py``, ``config.py``, ``trainer.py``.
    """

    name: ClassVar[str] = "sparsify"
    files = (FILE,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with ``sae.safetensors`` and ``cfg.json``."""
        return folders_with(location, FILE, CONFIG)

    def claims(self, location: Location) -> bool:
        """Whether the folder has both files."""
        return location.file is None and FILE in location and CONFIG in location

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read the SAE's and the training run's configuration, and names and shapes from the header.

        Raises:
            CheckpointError: if the configuration cannot be used, or does not match the tensors.
        """
        where = f"{CONFIG} of {location}"
        config = location.read_json(CONFIG)
        skips = flag(config, "skip_connection", where, False)
        names = {**NAMES, SKIP: SKIP} if skips else NAMES
        stored = renamed(location.tensors(FILE), names, f"{FILE} of {location}")
        d_sae, d_in, d_out = widths(stored)
        _require_widths(config, d_in, d_sae, where)
        subtracts = not flag(config, "transcode", where, False)
        model_class, settings = _architecture(config, where)
        sae_config = model_class.config_class(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            apply_b_dec_to_input=subtracts,
            skip_connection=skips,
            **_site_fields(location, transcodes=not subtracts),
            **settings,
        )
        return Checkpoint(model_class, sae_config, location.origin(self.name, [CONFIG, FILE]), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write SAEs and transcoders of every activation, of old and new versions."""
        now = {
            "activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": 3,
            "multi_topk": False, "skip_connection": False, "transcode": False,
        }  # fmt: skip
        llama = {"model": "meta-llama/Meta-Llama-3-8B", "sae": {}, "hookpoints": ["layers.10"]}
        pythia = {"model": "EleutherAI/pythia-70m", "sae": {}, "revision": "step3000", "hookpoints": []}
        runs: dict[str, dict[str, Any]] = {
            "EleutherAI/sae-llama-3-8b-32x": llama,
            "EleutherAI/sae-pythia-70m-32k": pythia,
            "EleutherAI/skip-transcoder-pythia-70m": {**pythia, "transcode": True},
        }
        plan: list[tuple[str, str, dict[str, Any]]] = [
            ("EleutherAI/sae-llama-3-8b-32x", "layers.10", {"expansion_factor": 3, "k": 3, "signed": False}),
            ("EleutherAI/sae-llama-3-8b-32x", "layers.10.mlp", {"k": 2, "signed": True, "normalize_decoder": False}),
            ("EleutherAI/sae-llama-3-8b-32x", "embed_tokens", {**now, "multi_topk": True, "num_latents": 18}),
            ("EleutherAI/sae-llama-3-8b-32x", "best/layers.10/layers.10", now),
            ("EleutherAI/sae-pythia-70m-32k", "layers.3/seed1", {**now, "activation": "groupmax"}),
            ("EleutherAI/sae-pythia-70m-32k", "layers.3.attention/seed12", now),
            ("EleutherAI/sae-pythia-70m-32k", "layers.4.mlp", {**now, "transcode": True}),
            ("EleutherAI/sae-pythia-70m-32k", "layers.4", {**now, "transcode": True, "skip_connection": True}),
            ("EleutherAI/skip-transcoder-pythia-70m", "layers.5.mlp", {"k": 3, "skip_connection": True}),
        ]
        generator = torch.Generator().manual_seed(0)
        for repo, folder, config in plan:
            d, s = 6, 18
            shapes = {"encoder.weight": (s, d), "encoder.bias": (s,), "W_dec": (s, d), "b_dec": (d,)}
            shapes |= {SKIP: (d, d)} if config.get("skip_connection") else {}
            path = root / repo / folder
            path.mkdir(parents=True, exist_ok=True)
            save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path / FILE)
            (path / CONFIG).write_text(json.dumps({**config, "d_in": d}))
        for repo, run in runs.items():
            (root / repo / RUN_CONFIG).write_text(json.dumps(run))
        return [Example(repo, folder) for repo, folder, _ in plan]


def _require_widths(config: Mapping[str, Any], d_in: int, d_sae: int, where: str) -> None:
    """Raise unless the tensors have the widths in the configuration."""
    stated = {"d_in": (integer(config, "d_in", where, d_in), d_in)}
    stated["num_latents"] = (integer(config, "num_latents", where, 0) or d_sae, d_sae)
    for name, (value, found) in stated.items():
        if value != found:
            raise CheckpointError(f"{where} has {name} = {value}, but the tensors have {found}: fetch both again.")


def _architecture(config: Mapping[str, Any], where: str) -> tuple[type[SAEModel], dict[str, Any]]:
    """Return the architecture and its own settings."""
    k = integer(config, "k", where, DEFAULT_K)
    activation = one_of(config, "activation", where, ("topk", "groupmax"), "topk")
    if flag(config, "signed", where, False):
        return AbsTopKSAE, {"k": k}
    return (GroupMaxSAE, {"groups": k}) if activation == "groupmax" else (TopKSAE, {"k": k})


def _site_fields(location: Location, *, transcodes: bool) -> dict[str, Any]:
    """Return the fields for sites and base model that folder names and the run's configuration determine.

    Args:
        location: the folder.
        transcodes: ``transcode`` in the SAE's configuration; old ones have it in the run's instead.
    """
    folders = _unseeded(location.subfolder.split("/") if location.subfolder else [])
    run, where = _run(location, folders)
    model = repository_of(text(run, "model", where, None))
    if model is None:
        model = known_facts(location.repo_id, location.address).get("base_model")
    fields: dict[str, Any] = {"base_model": model}
    if model is not None:
        fields["base_model_revision"] = text(run, "revision", where, None)
    hookpoint = (folders or _unseeded(location.repo_id.split("/")) or [""])[
        -1
    ]  # a local folder may itself be named for a hookpoint
    if not is_module(hookpoint, run):
        return fields
    before, after = sites_of(hookpoint)
    if transcodes or flag(run, "transcode", where, False):
        return {**fields, "site": before, "site_out": after}
    return {**fields, "site": after}


def _unseeded(folders: list[str]) -> list[str]:
    """Return the folders of a path without a seed's folder at the end."""
    return folders[:-1] if folders and _SEED.fullmatch(folders[-1]) else folders


def _run(location: Location, folders: list[str]) -> tuple[Mapping[str, Any], str]:
    """Return the training run's configuration, from the nearest folder above that has one; empty if none has."""
    for depth in range(len(folders), -1, -1):
        above = location.at("/".join(folders[:depth]))
        if RUN_CONFIG in above:
            config = above.read_json(RUN_CONFIG)
            if isinstance(config.get("sae"), dict):
                return config, f"{RUN_CONFIG} of {above}"
    return {}, RUN_CONFIG


def sites_of(hookpoint: str) -> tuple[str, str]:
    """Return the sites of a module's input and output.

    >>> sites_of("layers.10"), sites_of("layers.10.mlp")[1]
    (('resid_pre.10', 'resid_post.10'), 'layers.10.mlp.output')
    """
    block = _BLOCK.fullmatch(hookpoint)
    if block is None:
        return f"{hookpoint}.input", f"{hookpoint}.output"
    return f"resid_pre.{block[1]}", f"resid_post.{block[1]}"


def is_module(name: str, run: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a folder is named for a module: a hookpoint of the run, a module in a block, or the embedding."""
    listed = run.get("hookpoints")
    if isinstance(listed, list) and name in listed:
        return True
    part_of_block = _BLOCK.match(name)
    return _EMBEDDING.fullmatch(name) is not None or (
        part_of_block is not None and re.fullmatch(r"(\.\w+)*", name[part_of_block.end() :]) is not None
    )
