"""Where dictionary_learning's activations were taken, by what its configuration says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..hub.base_model_norms import has_post_norms
from ._config_values import integer, text

BLOCK = ("resid_post", "resid_out", "residual", "resid", "res")
ATTENTION = ("attn_out", "attention_out", "attn", "attention", "att")
MLP = ("mlp_out", "mlp")
EMBEDDING = ("embed", "embedding", "embeddings")

_NAME = re.compile(rf"(?<![a-z])({'|'.join((*BLOCK, 'resid_pre', *ATTENTION, *MLP))})_layer_?(\d+)(?!\d)")

_NUMBER = re.compile(r"\d{1,4}", re.ASCII)

SITES = {
    "block": {"in": "resid_pre.{}", "out": "resid_post.{}"},
    "before the block": {"in": "resid_pre.{}", "out": "resid_pre.{}"},
    "attention": {"in": "attn_in.{}", "out": "attn_out.{}"},
    "mlp": {"in": "mlp_in.{}", "out": "mlp_out.{}"},
}
RAW = {"attention": "layers.{}.self_attn.output", "mlp": "layers.{}.mlp.output"}
"""The sublayers' own outputs in those families, as paths inside the base model."""


def place_of(trainer: Mapping[str, Any], buffer: Mapping[str, Any], address: str, where: object) -> dict[str, Any]:
    """Return the site, and for a transcoder where its output belongs, as far as they are said.

    The submodule is named by ``trainer.submodule_name``, such as ``"resid_post_layer_8"``, or else by a folder of that
    name; ``buffer.io`` says whether its input or its output was read, or both. Nothing is returned for other names.

    Args:
        trainer: the configuration's ``trainer``.
        buffer: its ``buffer``, empty where there is none.
        address: repository and path of the SAE in it.
        where: the configuration, for messages.

    Raises:
        CheckpointError: if a value is of the wrong type, or ``trainer.layer`` is another layer than the name's.
    """
    name = text(trainer, "submodule_name", where, None)
    side = text(buffer, "io", where, "out")
    layer = _layer(trainer, where)
    if name in EMBEDDING and side == "out":
        return {"site": "embed"}
    found = _NAME.search(address if name is None else name)
    if found is None or side not in ("in", "out", "in_and_out"):
        return {}
    if layer is not None and layer != int(found[2]):
        raise CheckpointError(f"{where} says layer = {layer}, but the activations' name is {found[0]!r}: correct one.")
    kind = _kind(found[1])
    model = text(trainer, "lm_name", where, None)
    sites = dict(SITES[kind])
    if kind in RAW and has_post_norms(model):
        sites["out"] = RAW[kind]
    if side == "in_and_out":
        return {"site": sites["in"].format(found[2]), "site_out": sites["out"].format(found[2])}
    return {"site": sites[side].format(found[2])}


def _layer(trainer: Mapping[str, Any], where: object) -> int | None:
    """Return the number of the block, which some write as a text."""
    said = trainer.get("layer")
    return int(said) if isinstance(said, str) and _NUMBER.fullmatch(said) else integer(trainer, "layer", where, None)


def _kind(name: str) -> str:
    """Return what a submodule is."""
    if name == "resid_pre":
        return "before the block"
    return "attention" if name in ATTENTION else "mlp" if name in MLP else "block"
