"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): SAEs and transcoders for Gemma 2."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..architectures.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from ..hub.base_model_norms import normalization_of
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint, as_stored
from ._folders import folders_with
from ._folding import fold_input_scale
from .base import CheckpointFormat, Example, widths

FILE = "params.npz"
TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_ADDRESS = re.compile(r"(?:layer_(?P<layer>\d+)|(?P<embedding>embedding))/width_\w+/average_l0_\d+")
_REPO = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)")
EMBEDDING_SITE = "embed"
_log = logging.getLogger(__name__)
SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


class GemmaScopeFormat(CheckpointFormat):
    """Written by Google DeepMind: ``layer_L/width_W/average_l0_N/params.npz``, without a configuration.

    ``W_enc`` is ``[d_in, d_sae]``. Base model and site are in the repository's name: ``res`` is the residual stream
    after block L, ``mlp`` the MLP's contribution to it (after Gemma's post-norm), ``att`` the concatenated heads
    before the output projection. ``transcoders`` read the MLP's normalised input before the norm's gain and write
    ``mlp``. Trained without BOS.

    Source: google/gemma-scope; shapes and sites from the technical report.
    """

    name: ClassVar[str] = "gemma_scope"
    files = (FILE,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders of ``params.npz``."""
        return folders_with(location, FILE)

    def claims(self, location: Location) -> bool:
        """Whether there is a ``params.npz`` with Gemma Scope's tensors."""
        if location.file is not None or FILE not in location:
            return False
        return set(location.content(FILE)) == TENSORS

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, and site and base model from the names of folder and repository."""
        stored = location.tensors(FILE)
        stored["W_enc_T"] = stored.pop("W_enc").T
        d_sae, d_in, d_out = widths(stored)
        fields = _site_fields(location)
        config = JumpReLUSAEConfig(
            d_in=d_in, d_sae=d_sae, d_out=d_out, apply_b_dec_to_input=False, trained_on_bos=False, **fields
        )
        # Embedding SAEs read rows of the table; the model's site has them times sqrt(d_in).
        finish = partial(fold_input_scale, scale=d_in**-0.5) if fields.get("site") == EMBEDDING_SITE else as_stored
        return Checkpoint(JumpReLUSAE, config, location.origin(self.name, [FILE]), stored, finish=finish)

    def examples(self, root: Path) -> list[Example]:
        """Write one SAE per site, and a transcoder."""
        made = [
            Example("google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_71"),
            Example("google/gemma-scope-9b-it-res", "layer_0/width_131k/average_l0_10"),
            Example("google/gemma-scope-2b-pt-mlp", "layer_1/width_16k/average_l0_12"),
            Example("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
            Example("google/gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104"),
            Example("google/gemma-scope-2b-pt-transcoders", "layer_1/width_16k/average_l0_6"),
        ]
        generator = np.random.default_rng(0)
        for number, example in enumerate(made):
            d, s, folder = 6 + number, 16, root / example.repo / example.address
            folder.mkdir(parents=True, exist_ok=True)
            shapes = {"W_enc": (d, s), "W_dec": (s, d), "b_enc": (s,), "b_dec": (d,)}
            values: Any = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
            np.savez(folder / FILE, **values, threshold=generator.uniform(0.1, 1, s).astype(np.float32))
        return made


def _site_fields(location: Location) -> dict[str, Any]:
    """Return the fields for site and base model that the names determine."""
    layer = _ADDRESS.search(location.address)
    repo = _REPO.search(location.repo_id)
    if layer is None or repo is None:
        if layer and layer["embedding"]:
            return {"site": EMBEDDING_SITE}
        _log.warning(
            "%s is not in a folder and repository with Gemma Scope's names, from which site and base model are read: "
            "both are unknown, and it is read as an SAE of the stream, not as a transcoder.",
            location,
        )
        return {}
    model = f"google/gemma-2-{repo['size']}" + ("-it" if repo["kind"] == "it" else "")
    if layer["embedding"]:
        return {"base_model": model, "site": EMBEDDING_SITE}
    if repo["site"] == "transcoders":
        fields = {"site": f"resid_mid.{layer['layer']}", "site_out": f"mlp_out.{layer['layer']}"}
        return {"base_model": model, **fields, **normalization_of("rms_norm", model, repo["site"], location)}
    return {"base_model": model, "site": f"{SITES[repo['site']]}.{layer['layer']}"}
