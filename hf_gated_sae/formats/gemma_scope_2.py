"""Gemma Scope 2 (Google DeepMind 2025): SAEs and transcoders for Gemma 3, one site each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from ..architectures.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from ..errors import CheckpointError
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ._config_values import text
from ._folders import folders_with
from ._module_paths import site_of_path
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, widths

FILE = "params.safetensors"
CONFIG = "config.json"
ARCHITECTURE = "jump_relu"
AFFINE = "affine_skip_connection"
NAMES = {"W_enc_T": "w_enc.T", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
SITES = {
    "resid_post": ("resid_post", None),
    "attn_out": ("attn_z", None),
    "mlp_out": ("mlp_out", None),
    "transcoder": ("mlp_in", "mlp_out"),
}
"""Site that is read and, for transcoders, site that is written, by the name of the top folder."""

_ADDRESS = re.compile(
    rf"(?P<kind>{'|'.join(SITES)})(_all)?/layer_(?P<layer>\d+)_width_\w+?_l0_(small|medium|big)(_affine)?"
)
_REPO = re.compile(r"gemma-scope-2-(?P<size>\d+m|\d+b)-(?P<kind>pt|it)")
_MODEL = re.compile(r"(?:google/)?gemma-v?3-(?P<size>\d+m|\d+b)-(?P<kind>pt|it)")


class GemmaScope2Format(CheckpointFormat):
    """Written by Google DeepMind: ``SITE[_all]/layer_L_width_W_l0_N[_affine]/params.safetensors`` and ``config.json``.

    ``w_enc`` is ``[d_in, d_sae]``. The configuration names the sites by module paths, and the base model; where it is
    missing, the names of folder and repository determine them. Transcoders read the MLP's input after the norm's gain;
    ``_affine`` ones add ``x @ affine_skip_connection``. Trained without BOS. Files with examples of texts are ignored.

    Source: google/gemma-scope-2-* on the Hub.
    """

    name: ClassVar[str] = "gemma_scope_2"
    files = (FILE,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders of ``params.safetensors``."""
        return folders_with(location, FILE)

    def claims(self, location: Location) -> bool:
        """Whether there is a ``params.safetensors`` with Gemma Scope 2's tensors."""
        return location.file is None and FILE in location and set(location.content(FILE)) - {AFFINE} == TENSORS

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, site and base model from the configuration or from names.

        Raises:
            CheckpointError: if the configuration has an unknown value.
        """
        held = location.tensors(FILE)
        names = {**NAMES, "W_skip": f"{AFFINE}.T"} if AFFINE in held else NAMES
        stored = renamed(held, names, f"{FILE} of {location}")
        d_sae, d_in, d_out = widths(stored)
        files = [FILE, CONFIG] if CONFIG in location else [FILE]
        config = JumpReLUSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            apply_b_dec_to_input=False,
            skip_connection="W_skip" in stored,
            trained_on_bos=False,
            **(_fields_of_config(location) if CONFIG in location else _fields_of_names(location)),
        )
        return Checkpoint(JumpReLUSAE, config, location.origin(self.name, files), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write SAEs of every site and transcoders, with and without a configuration."""
        return write_examples(root)


def base_model_of(repo_id: str) -> str | None:
    """Return the base model of a repository of Gemma Scope 2, from its name; None for another name.

    >>> base_model_of("google/gemma-scope-2-270m-pt")
    'google/gemma-3-270m'
    """
    repo = _REPO.search(repo_id)
    return _gemma_3(repo) if repo else None


def model_of(name: str) -> str | None:
    """Return the repository of a base model from its name in configurations, such as ``gemma-v3-1b-pt``."""
    model = _MODEL.fullmatch(name)
    return _gemma_3(model) if model else repository_of(name)


def _gemma_3(match: re.Match[str]) -> str:
    # The pretrained version of the smallest model has no suffix.
    plain = match["size"] == "270m" and match["kind"] == "pt"
    return f"google/gemma-3-{match['size']}" + ("" if plain else f"-{match['kind']}")


def _fields_of_config(location: Location) -> dict[str, Any]:
    """Return the fields for site and base model from ``config.json``."""
    config, where = location.read_json(CONFIG), f"{CONFIG} of {location}"
    if (architecture := text(config, "architecture", where, ARCHITECTURE)) != ARCHITECTURE:
        raise CheckpointError(f"{where} has architecture {architecture[:60]!r}; expected {ARCHITECTURE!r}.")
    site = site_of_path(text(config, "hf_hook_point_in", where))
    site_out = text(config, "hf_hook_point_out", where, None)
    written = site_of_path(site_out) if site_out else site
    model = text(config, "model_name", where, None)
    return {
        "site": site,
        "site_out": None if written == site else written,
        "base_model": model_of(model) if model else base_model_of(location.repo_id),
    }


def _fields_of_names(location: Location) -> dict[str, Any]:
    """Return the fields for site and base model that the names of folder and repository determine."""
    address = _ADDRESS.search(location.address)
    if address is None:
        return {"base_model": base_model_of(location.repo_id)}
    site, site_out = (kind and f"{kind}.{address['layer']}" for kind in SITES[address["kind"]])
    return {"site": site, "site_out": site_out, "base_model": base_model_of(location.repo_id)}


def write_examples(root: Path) -> list[Example]:
    """Write the examples; configurations name sites as the real ones do."""
    block, language = "model.layers.1", "model.language_model.layers.0"
    heads = f"{block}.self_attn.o_proj.input"
    norms = "{0}.pre_feedforward_layernorm.output", "{0}.post_feedforward_layernorm.output"
    read, written = (norm.format(block) for norm in norms)
    read_4b, written_4b = (norm.format(language) for norm in norms)
    made: list[tuple[str, str, tuple[str, str, str] | None]] = [
        ("1b-pt", "resid_post/layer_1_width_16k_l0_medium", (f"{block}.output", f"{block}.output", "gemma-v3-1b-pt")),
        ("270m-pt", "resid_post_all/layer_0_width_262k_l0_small", None),
        ("1b-it", "attn_out_all/layer_1_width_16k_l0_big", (heads, heads, "gemma-3-1b-it")),
        ("4b-pt", "mlp_out/layer_0_width_65k_l0_medium", (written_4b, written_4b, "google/gemma-3-4b-pt")),
        ("12b-it", "attn_out/layer_1_width_1m_l0_small", None),
        ("1b-pt", "mlp_out_all/layer_1_width_16k_l0_small", None),
        ("4b-it", "transcoder/layer_0_width_16k_l0_big", (read_4b, written_4b, "gemma-v3-4b-it")),
        ("1b-pt", "transcoder_all/layer_1_width_16k_l0_small_affine", (read, written, "gemma-v3-1b-pt")),
        ("270m-pt", "transcoder_all/layer_0_width_16k_l0_big_affine", None),
    ]
    generator = torch.Generator().manual_seed(2)
    examples = []
    for number, (repo, address, hooks) in enumerate(made):
        example = Example(f"google/gemma-scope-2-{repo}", address)
        folder = root / example.repo / address
        d, s = 6 + number % 3, 12 + number
        o = d + 1 if address.startswith("transcoder") else d
        affine = address.endswith("_affine")
        write_tensors(folder, d, s, o, generator, affine=affine)
        if hooks is not None:
            described: dict[str, Any] = dict(
                zip(("hf_hook_point_in", "hf_hook_point_out", "model_name"), hooks, strict=True)
            )
            more = {"width": s, "architecture": ARCHITECTURE, "l0": 20, "affine_connection": affine}
            (folder / CONFIG).write_text(json.dumps({**described, **more, "type": "sae"}))
        examples.append(example)
    return examples


def write_tensors(folder: Path, d: int, s: int, o: int, generator: torch.Generator, *, affine: bool) -> None:
    """Write the weights of one SAE or transcoder."""
    shapes = {"w_enc": (d, s), "w_dec": (s, o), "b_enc": (s,), "b_dec": (o,)}
    if affine:
        shapes[AFFINE] = (d, o)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["threshold"] = 0.1 + torch.rand(s, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE)
