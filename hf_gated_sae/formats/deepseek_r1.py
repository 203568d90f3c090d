"""qresearch's SAEs, such as the one for DeepSeek-R1-Distill-Llama-8B."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import torch

from ..architectures.standard import StandardSAE, StandardSAEConfig
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths
from .goodfire import single_files

FILE = re.compile(r"(?P<model>.+)-SAE-l(?P<layer>\d+)\.pt")
NAMES = {"W_enc_T": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias"}


class DeepSeekR1Format(CheckpointFormat):
    """Written by qresearch: ``<base model>-SAE-l19.pt``, the state of the linear layers ``encoder`` and ``decoder``.

    In bfloat16. Latents are ``relu(encoder(x))`` of the residual stream after the block in the file's name.

    Source: qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19.
    """

    name: ClassVar[str] = "deepseek_r1"
    files = ("*.pt",)

    def addresses(self, location: Location) -> list[str]:
        """Return folders with one such file, and the files of folders with several."""
        return single_files(location, FILE)

    def claims(self, location: Location) -> bool:
        """Whether there is such a file with two linear layers."""
        file = selected_file(location, FILE)
        return file is not None and set(location.content(file)) == {
            stored_name.removesuffix(".T") for stored_name in NAMES.values()
        }

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, layer and base model from the file's name."""
        file = selected_file(location, FILE) or ""
        stored = renamed(location.tensors(file), NAMES, f"{file} of {location}")
        d_sae, d_in, d_out = widths(stored)
        match = FILE.fullmatch(file)
        fields = {"site": f"resid_post.{match['layer']}", "base_model": repository_of(match["model"])} if match else {}
        config = StandardSAEConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, apply_b_dec_to_input=False, **fields)
        return Checkpoint(StandardSAE, config, location.origin(self.name, [file]), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write an SAE for each of two base models."""
        made = []
        for seed, name in enumerate(("DeepSeek-R1-Distill-Llama-8B-SAE-l19", "Llama-3.2-1B-Instruct-SAE-l9")):
            generator, d, s = torch.Generator().manual_seed(seed), 7, 18
            made.append(Example(f"qresearch/{name}"))
            shapes = {"encoder.weight": (s, d), "encoder.bias": (s,), "decoder.weight": (d, s), "decoder.bias": (d,)}
            state = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
            (root / made[-1].repo).mkdir(parents=True, exist_ok=True)
            torch.save(state, root / made[-1].repo / f"{name}.pt")
        return made
