"""SAELens, versions 2 to 5, and why older checkpoints are not read."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from ..architectures.tanh_relu import TanhReLUSAE
from ..errors import CheckpointError
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ._config_values import integer, mapping, one_of
from ._folders import folders_with
from ._saelens_sites import EXPECTED_AVERAGE
from .base import CheckpointFormat, Example
from .saelens import CONFIG, KINDS, WEIGHTS, Kind, described_checkpoint

PICKLES = ("final_sparse_autoencoder_*.pt", "*.pkl.gz")
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
ACTIVATIONS = ("relu", "tanh-relu", "topk")
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
TANH_RELU = Kind(TanhReLUSAE)


class SAELensLegacyFormat(CheckpointFormat):
    """Written by SAELens 2 to 5: ``cfg.json`` without ``metadata``, and ``sae_weights.safetensors``.

    Version 2 wrote the whole configuration of the training run, with ``hook_point``; versions 3 to 5 the SAE's own,
    with ``hook_name``. A tensor ``scaling_factor [d_sae]`` from fine-tuning scales the latents on decoding; it is
    folded into the decoder's rows.

    Source: jbloomAus/SAELens, versions 2 to 5.
    """

    name: ClassVar[str] = "saelens_legacy"
    files = (WEIGHTS,)

    def addresses(self, location: Location) -> list[str]:
        """Return the folders with both files, of any version of SAELens."""
        return folders_with(location, CONFIG, WEIGHTS)

    def claims(self, location: Location) -> bool:
        """Whether the folder has both files, and the configuration has no ``metadata``."""
        if location.file is not None or CONFIG not in location or WEIGHTS not in location:
            return False
        return not isinstance(location.read_json(CONFIG).get("metadata"), dict)

    def near_miss(self, location: Location) -> str | None:
        """Return why pickles of version 1 and before are not read."""
        names = [location.file] if location.file else location.files
        for name in names:
            if any(fnmatch.fnmatch(PurePosixPath(name).name, pattern) for pattern in PICKLES):
                return (
                    f"{name} is a checkpoint of SAELens 1 or older, a pickle of its own classes, which is not opened, "
                    "as it could run any code. Look for a copy in safetensors (GPT2-Small-SAEs has one, "
                    "jbloom/GPT2-Small-SAEs-Reformatted), or, if you trust the file, convert it with SAELens 2 and "
                    f"load the folder with {CONFIG} and {WEIGHTS}."
                )
        return None

    def open(self, location: Location, *, variant: str | None = None) -> Checkpoint:
        """Read shapes from the header, the rest from ``cfg.json``."""
        where = f"{CONFIG} of {location}"
        cfg = {RENAMED.get(name, name): value for name, value in location.read_json(CONFIG).items()}
        cfg = {**cfg, **_activation(cfg, where)}
        kind = cfg.pop("kind")
        if isinstance(cfg.get("normalize_activations"), bool):  # version 3
            cfg["normalize_activations"] = EXPECTED_AVERAGE if cfg["normalize_activations"] else "none"
        return described_checkpoint(location, self.name, kind, cfg, cfg)

    def examples(self, root: Path) -> list[Example]:
        """Write SAEs of every version, architecture and normalisation."""
        from ._saelens_examples import write_legacy  # only tests need it

        return write_legacy(root)


def _activation(cfg: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the architecture as a `Kind`, and `k`.

    Raises:
        CheckpointError: if SAELens has no such architecture with that activation.
    """
    architecture = one_of(cfg, "architecture", where, ARCHITECTURES, "standard")
    activation = one_of(cfg, "activation_fn", where, ACTIVATIONS, "topk" if architecture == "topk" else "relu")
    if activation == "topk" and architecture in ("standard", "topk"):
        return {"kind": KINDS["topk"], "k": integer(mapping(cfg, "activation_fn_kwargs", where, {}), "k", where)}
    if activation == "tanh-relu" and architecture == "standard":
        return {"kind": TANH_RELU}
    if activation != "relu":
        raise CheckpointError(
            f"{where} has architecture = {architecture!r} with the activation {activation!r}; expected 'relu' "
            "with that architecture."
        )
    return {"kind": KINDS[architecture]}
