"""Qwen-Scope (Qwen team 2026, arXiv 2605.11887): TopK SAEs for Qwen3 and Qwen3.5."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import torch

from ..architectures.topk import TopKSAE, TopKSAEConfig
from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ._config_values import integer
from ._tensor_names import renamed
from .base import CheckpointFormat, Example, selected_file, widths

FILE = re.compile(r"layer(?P<layer>\d+)\.sae\.pt")
CONFIG = "config.json"
NAMES = {"W_enc_T": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}
_REPO = re.compile(r"SAE-Res-(?P<model>.+)-W\d+K-L0_(?P<k>\d+)")


class QwenScopeFormat(CheckpointFormat):
    """Written by the Qwen team: ``layer0.sae.pt``, ``layer1.sae.pt`` ... in one folder; the address is the file.

    The tensors are ``W_enc [d_sae, d]`` and ``W_dec [d, d_sae]``, contrary to the usual orientation. Latents are the
    `k` largest pre-latents of a token, without a ReLU, of the residual stream after the block. `k` and the base model
    are in the repository's name, ``Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50``. Qwen has no BOS token.

    Source: the example on the model cards of Qwen/SAE-Res-*.
    """

    name: ClassVar[str] = "qwen_scope"
    files = ("layer*.sae.pt",)

    def addresses(self, location: Location) -> list[str]:
        """Return the files."""
        return [file for file in location.files if FILE.fullmatch(file.rsplit("/", 1)[-1])]

    def claims(self, location: Location) -> bool:
        """Whether the address is a file with such a name and Qwen-Scope's tensors."""
        if location.file is None:
            return False
        file = selected_file(location, FILE)
        return file is not None and set(location.content(file)) == {"W_enc", "W_dec", "b_enc", "b_dec"}

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, layer, `k` and base model from the names of file and repository.

        Raises:
            CheckpointError: if the names do not have `k`.
        """
        file = selected_file(location, FILE) or ""
        stored = renamed(location.tensors(file), NAMES, f"{file} of {location}")
        d_sae, d_in, d_out = widths(stored)
        layer, repo = FILE.fullmatch(file), _REPO.search(location.repo_id)
        config = TopKSAEConfig(
            **{"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "apply_b_dec_to_input": False, "rectified": False},
            k=_k(location),
            site=f"resid_post.{layer['layer']}" if layer else None,
            base_model=f"Qwen/{repo['model']}" if repo else None,
            trained_on_bos=False,
        )
        return Checkpoint(TopKSAE, config, location.origin(self.name, [file]), stored)

    def examples(self, root: Path) -> list[Example]:
        """Write two layers of one repository, and one of another, with a configuration beside it."""
        large, small = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_10", "Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_14"
        made = [Example(large, "layer0.sae.pt"), Example(large, "layer11.sae.pt"), Example(small, "layer3.sae.pt")]
        d, s = 7, 18
        for seed, example in enumerate(made):
            generator = torch.Generator().manual_seed(seed)
            shapes = {"W_enc": (s, d), "W_dec": (d, s), "b_enc": (s,), "b_dec": (d,)}
            state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            state["b_enc"] -= 2.5  # so that some of the largest pre-latents are negative
            folder = root / example.repo
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / example.address)
        config = {"model_type": "topk_sae", "d_model": d, "d_sae": s, "k": 14, "hook_point": "resid_post"}
        (root / small / CONFIG).write_text(json.dumps(config))
        return made


def _k(location: Location) -> int:
    """Return the number of selected latents, from the repository's name and, if there is one, ``config.json``.

    Raises:
        CheckpointError: if neither has it, or they disagree.
    """
    named = _REPO.search(location.repo_id)
    stated = [int(named["k"])] if named else []
    if CONFIG in location:
        found = integer(location.read_json(CONFIG), "k", f"{CONFIG} of {location}", None)
        stated += [] if found is None else [found]
    if len(set(stated)) != 1:
        raise CheckpointError(
            f"The k of {location} is {' or '.join(map(str, stated)) or 'not stated'}; expected it at the end of the "
            "repository's name, as in SAE-Res-Qwen3-8B-Base-W64K-L0_50: keep that name for the folder."
        )
    return stated[0]
