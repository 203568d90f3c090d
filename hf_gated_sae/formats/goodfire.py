"""Goodfire's SAEs for Llama 3.1, Llama 3.3 and gpt-oss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..architectures.standard import StandardSAE
from ..architectures.topk import TopKSAE
from ..errors import CheckpointError
from ..hub.location import Location
from ..hub.model_names import repository_of
from ..modeling.checkpoint import Checkpoint, as_stored
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths

FILE = re.compile(r".+-SAE-l(?P<layer>\d+)\.pth?|topk_sae_l(?P<topk_layer>\d+)_exp\d+_k(?P<k>\d+)\.pth?")
_MODEL = re.compile(r"(?:.*/)?(?:Hackathon-)?(?P<model>[^/]+)-SAE-l\d+")
ENCODER, DECODER, TOPK_DECODER = "encoder_linear.weight", "decoder_linear.weight", "decoder.weight"
RELU_NAMES = {
    **{"W_enc_T": ENCODER, "b_enc": "encoder_linear.bias"},
    **{"W_dec": f"{DECODER}.T", "b_dec": "decoder_linear.bias"},
}
TOPK_BIASES = {"encoder_linear.bias": "b_enc", "decoder_bias": "b_dec", "decoder.bias": "b_dec"}


class GoodfireFormat(CheckpointFormat):
    """Written by Goodfire: one torch file with the state of two linear layers, without a configuration.

    ``Llama-3.3-70B-Instruct-SAE-l50.pt``: ``encoder_linear`` and ``decoder_linear``, ``relu(encoder_linear(x))``.
    ``topk_sae_l15_exp16_k32.pt``: ``encoder_linear`` and ``decoder``, with or without biases, a ReLU and a TopK whose
    `k` is in the name of the file. Both read the residual stream after the block in the file's name.

    Source: the notebook beside Goodfire/Llama-3.1-8B-Instruct-SAE-l19.
    """

    name: ClassVar[str] = "goodfire"
    files = ("*.pt", "*.pth")

    def addresses(self, location: Location) -> list[str]:
        """Return folders with one such file, and the files of folders with several."""
        return single_files(location, FILE)

    def claims(self, location: Location) -> bool:
        """Whether there is such a file with Goodfire's tensors."""
        file = selected_file(location, FILE)
        if file is None:
            return False
        held = set(location.content(file))
        return ENCODER in held and (DECODER in held or TOPK_DECODER in held)

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, layer and base model from the names.

        Raises:
            CheckpointError: if the file's name lacks the `k` of a TopK, or has one for an SAE with a ReLU.
        """
        file = selected_file(location, FILE) or ""
        held, match = location.tensors(file), FILE.fullmatch(file)
        layer, k = (match["layer"] or match["topk_layer"], match["k"]) if match else (None, None)
        if (k is None) != (DECODER in held):
            raise CheckpointError(
                f"{file} of {location} holds {', '.join(sorted(held))}; expected {DECODER} of an SAE with a ReLU, or "
                f"{TOPK_DECODER} of a TopK with k in the file's name, such as topk_sae_l15_exp16_k32.pt."
            )
        names = RELU_NAMES if k is None else _topk_names(held)
        stored = renamed(held, names, f"{file} of {location}")
        d_sae, d_in, d_out = widths(stored)
        fields = {"site": f"resid_post.{layer}" if layer else None, "base_model": _base_model(location, file)}
        settings = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "apply_b_dec_to_input": False, **fields}
        origin = location.origin(self.name, [file])
        if k is None:
            return Checkpoint(StandardSAE, StandardSAE.config_class(**settings), origin, stored)
        config = TopKSAE.config_class(**settings, k=int(k))
        finish = as_stored if {"b_enc", "b_dec"} <= set(stored) else partial(with_biases, width=d_out)
        return Checkpoint(TopKSAE, config, origin, stored, finish=finish)

    def examples(self, root: Path) -> list[Example]:
        """Write both kinds, with both suffixes, the TopK with and without biases."""
        made = []
        for seed, (repo, file, biases) in enumerate(
            (
                ("Llama-3.3-70B-Instruct-SAE-l50", "Llama-3.3-70B-Instruct-SAE-l50.pt", None),
                ("Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", None),
                ("Hackathon-gpt-oss-20b-SAE-l15", "topk_sae_l15_exp16_k5.pt", ("decoder_bias",)),
                ("Hackathon-gpt-oss-20b-SAE-l7", "topk_sae_l7_exp16_k5.pt", ("encoder_linear.bias", "decoder_bias")),
                ("Hackathon-gpt-oss-20b-SAE-l3", "topk_sae_l3_exp16_k5.pt", ()),
            )
        ):
            made.append(Example(f"Goodfire/{repo}"))
            generator, d, s = torch.Generator().manual_seed(seed), 7, 18
            decoder = DECODER if biases is None else TOPK_DECODER
            shapes: dict[str, tuple[int, ...]] = {ENCODER: (s, d), decoder: (d, s)}
            for bias in ("encoder_linear.bias", "decoder_linear.bias") if biases is None else biases:
                shapes[bias] = (s,) if bias.startswith("encoder") else (d,)
            state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            (root / made[-1].repo).mkdir(parents=True, exist_ok=True)
            torch.save(state, root / made[-1].repo / file)
        return made


def single_files(location: Location, pattern: re.Pattern[str]) -> list[str]:
    """Return folders with exactly one matching file, and the matching files of folders with several."""
    files = [file for file in location.files if pattern.fullmatch(file.rsplit("/", 1)[-1])]
    folders = [file.rpartition("/")[0] for file in files]
    return [folder if folders.count(folder) == 1 else file for file, folder in zip(files, folders, strict=True)]


def with_biases(tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Add biases of zeros where they are missing."""
    W_dec = tensors["W_dec"]
    return {"b_enc": W_dec.new_zeros(W_dec.shape[0]), "b_dec": W_dec.new_zeros(width), **tensors}


def _topk_names(held: Mapping[str, object]) -> dict[str, str]:
    """Return the names in the file of a TopK SAE's tensors, without missing biases."""
    biases = {name: stored_name for stored_name, name in TOPK_BIASES.items() if stored_name in held}
    return {"W_enc_T": ENCODER, "W_dec": f"{TOPK_DECODER}.T", **biases}


def _base_model(location: Location, file: str) -> str | None:
    """Return the base model in the file's or the repository's name."""
    match = _MODEL.match(file) or _MODEL.match(location.repo_id)
    return repository_of(match["model"]) if match else None
