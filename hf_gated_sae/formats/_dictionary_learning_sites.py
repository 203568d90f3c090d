"""The sites of dictionary_learning's SAEs, from its configuration."""

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
MODULE_OUTPUTS = {"attention": "layers.{}.self_attn.output", "mlp": "layers.{}.mlp.output"}
"""Module paths of the sublayers' outputs in families that have a norm after them, inside the base model."""


def site_fields(trainer: Mapping[str, Any], buffer: Mapping[str, Any], address: str, where: object) -> dict[str, Any]:
    """Return the configuration fields ``site`` and, for a transcoder, ``site_out``; empty for unknown names.

    The submodule is named by ``trainer.submodule_name``, such as ``"resid_post_layer_8"``, or else by a folder of that
    name; ``buffer.io`` states whether its input, its output, or both were used.

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
        raise CheckpointError(f"{where} has layer = {layer}, but the activations' name is {found[0]!r}: correct one.")
    kind = _kind(found[1])
    model = text(trainer, "lm_name", where, None)
    sites = dict(SITES[kind])
    if kind in MODULE_OUTPUTS and has_post_norms(model):
        sites["out"] = MODULE_OUTPUTS[kind]
    if side == "in_and_out":
        return {"site": sites["in"].format(found[2]), "site_out": sites["out"].format(found[2])}
    return {"site": sites[side].format(found[2])}


def _layer(trainer: Mapping[str, Any], where: object) -> int | None:
    """Return the number of the block, which some files have as a text."""
    stated = trainer.get("layer")
    return (
        int(stated)
        if isinstance(stated, str) and _NUMBER.fullmatch(stated)
        else integer(trainer, "layer", where, None)
    )


def _kind(name: str) -> str:
    """Return the kind of a submodule, a key of `SITES`."""
    if name == "resid_pre":
        return "before the block"
    return "attention" if name in ATTENTION else "mlp" if name in MLP else "block"
