"""Attention SAEs of GPT-2 small by Kissane and Krzyzanowski (2024)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import torch

from ..architectures.standard import StandardSAE, StandardSAEConfig
from ..errors import CheckpointError
from ..hub import index
from ..hub.base_model_norms import normalization_of
from ..hub.hook_names import site_of_hook
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ._config_values import integer, text
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths

TENSORS = {"W_enc_T": "W_enc.T", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_FILE = re.compile(r"[^/]*\.pt")
_STEM = re.compile(r"(?P<model>[\w-]+?)_L\d+_.*")


class ConnorRobFormat(CheckpointFormat):
    """Written by Kissane and Krzyzanowski: ``<name>.pt`` and ``<name>_cfg.json``, one pair per layer.

    ReLU SAEs with ``W_enc [d_in, d_sae]``, which read the concatenated heads before the output projection. The
    configuration has only the activations' width and hook point; the name starts with the base model. Whether the
    training library had folded GPT-2's value biases is not recorded; activations of Hugging Face's model are assumed.

    Source: ckkissane/attn-saes-gpt2-small-all-layers.
    """

    name: ClassVar[str] = "connor_rob"
    files = ("*.pt",)

    def addresses(self, location: Location) -> list[str]:
        """Return the ``.pt`` files that have a configuration beside them."""
        return [file for file in location.files if file.endswith(".pt") and _config_of(file) in location]

    def claims(self, location: Location) -> bool:
        """Whether there is one ``.pt`` file with a configuration beside it, and it has exactly these tensors."""
        file = self._weights_file(location)
        return file is not None and set(location.content(file)) == {
            name.removesuffix(".T") for name in TENSORS.values()
        }

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the site from the configuration, and the base model from the name."""
        file = self._weights_file(location)
        if file is None:
            raise CheckpointError(f"{location} is not a .pt file with its _cfg.json beside it; expected both files.")
        cfg, where = location.read_json(_config_of(file)), f"{_config_of(file)} of {location}"
        stored = renamed(location.content(file), TENSORS, f"{file} of {location}")
        d_sae, d_in, d_out = widths(stored)
        for key, width in (("act_size", d_in), ("dict_size", d_sae)):
            if integer(cfg, key, where, width) != width:
                raise CheckpointError(f"{where} has {key} = {cfg[key]}, and the tensors beside it have {width}.")
        facts = index.known_facts(location.repo_id, location.at(_below(location, file)).address)
        stem = _STEM.fullmatch(file)
        named = repository_of(text(cfg, "model_name", where, None) or (stem["model"] if stem else None))
        base_model = named or facts.get("base_model")
        name = text(cfg, "act_name", where)
        site, normalization = site_of_hook(name)
        config = StandardSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            site=site,
            base_model=base_model,
            **normalization_of(normalization, base_model, name, where),
        )
        return Checkpoint(StandardSAE, config, location.origin(self.name, [file, _config_of(file)]), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write two layers of one repository."""
        repo, d, s = "ckkissane/attn-saes-gpt2-small-all-layers", 12, 16
        names = [
            "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9",
            "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9",
        ]
        (root / repo).mkdir(parents=True, exist_ok=True)
        for layer, name in zip((0, 5), names, strict=True):
            generator = torch.Generator().manual_seed(layer)
            shapes = {"W_enc": (d, s), "W_dec": (s, d), "b_enc": (s,), "b_dec": (d,)}
            weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            torch.save(weights, root / repo / f"{name}.pt")
            cfg = {"seed": 49, "lr": 0.0012, "act_size": d, "dict_size": s, "device": "cuda:0", "dict_mult": 32}
            cfg |= {"act_name": f"blocks.{layer}.attn.hook_z", "site": "z", "layer": layer, "enc_dtype": "fp32"}
            (root / repo / f"{name}_cfg.json").write_text(json.dumps(cfg))
        return [Example(repo, f"{name}.pt") for name in names]

    @staticmethod
    def _weights_file(location: Location) -> str | None:
        """Return the ``.pt`` file at a location, if it has a configuration."""
        file = selected_file(location, _FILE)
        return file if file is not None and _config_of(file) in location else None


def _config_of(file: str) -> str:
    """Return the name of the configuration of a ``.pt`` file."""
    return f"{file.removesuffix('.pt')}_cfg.json"


def _below(location: Location, file: str) -> str:
    """Return a file's path from the root."""
    return f"{location.subfolder}/{file}" if location.subfolder else file
