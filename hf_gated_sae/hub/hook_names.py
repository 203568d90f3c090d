"""TransformerLens's hook points as sites; checkpoints of SAELens, circuit-tracer and OpenMOSS use these names, too."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import CheckpointError, did_you_mean
from .base_model_norms import has_post_norms


class ModuleOutput(NamedTuple):
    """The output of a sublayer's module, before a norm that may follow it.

    Attributes:
        site_in: the site that the module reads.
        module: its path in the block, in the families that have a norm after it.
    """

    site_in: str
    module: str


IN_BLOCK = {
    "hook_in": ("resid_pre", "none"),
    "hook_out": ("resid_post", "none"),
    "hook_resid_pre": ("resid_pre", "none"),
    "hook_resid_mid": ("resid_mid", "none"),
    "hook_resid_post": ("resid_post", "none"),
    "hook_attn_in": ("resid_pre", "none"),
    "hook_attn_out": ("attn_out", "none"),
    "hook_mlp_in": ("resid_mid", "none"),
    "hook_mlp_out": ("mlp_out", "none"),
    "attn.hook_in": ("attn_in", "none"),
    "attn.hook_out": ("attn_out", "none"),
    "attn.hook_z": ("attn_z", "none"),
    "attn.o.hook_in": ("attn_z", "none"),
    "mlp.hook_in": ("mlp_in", "none"),
    "mlp.hook_out": ("mlp_out", "none"),
    "mlp.hook_post": ("mlp_neurons", "none"),
    "mlp.out.hook_in": ("mlp_neurons", "none"),
    "ln1.hook_normalized": ("resid_pre", "rms_norm"),
    "ln2.hook_normalized": ("resid_mid", "rms_norm"),
}
"""Site and normalisation of each name inside a block.

``ln2.hook_normalized`` is the norm's output before its gain, which no module of transformers returns: it is the stream
before the norm, divided by its root mean square. ``hook_mlp_in`` is a copy of the stream before the norm.
"""
MODULE_OUTPUTS = {"attn.hook_out": ModuleOutput("attn_in", "self_attn"), "mlp.hook_out": ModuleOutput("mlp_in", "mlp")}
"""Outputs of attention and MLP, to which a norm may be applied before they are added to the stream."""
GLOBAL = {"hook_embed": "embed", "embed.hook_out": "embed"}

_BLOCK = re.compile(r"blocks\.([0-9]+)\.(.+)")


def site_of_hook(name: str, layer: int | None = None, base_model: str | None = None) -> tuple[str, str]:
    """Return the site and the normalisation of a TransformerLens hook point.

    Args:
        name: such as ``"blocks.12.hook_resid_post"``; or without the block if `layer` is given.
        layer: the block, if the name has none.
        base_model: the model; in some, a norm is applied to the MLP's output before it is added to the stream.

    Returns:
        The site, such as ``"resid_post.12"``, and one of the normalisations of `SAEConfig`.

    Raises:
        CheckpointError: if the name is unknown.

    >>> site_of_hook("blocks.5.hook_mlp_out")
    ('mlp_out.5', 'none')
    >>> site_of_hook("ln2.hook_normalized", layer=3)
    ('resid_mid.3', 'rms_norm')
    """
    if name in GLOBAL:
        return GLOBAL[name], "none"
    named, suffix = split(name)
    block = layer if named is None else named
    if block is None or suffix not in IN_BLOCK:
        raise CheckpointError(
            f"The checkpoint names the hook point {name!r}, which is unknown.{did_you_mean(suffix, IN_BLOCK)} "
            "Expected one in a block, such as blocks.12.hook_resid_post."
        )
    if suffix in MODULE_OUTPUTS and has_post_norms(base_model):
        return f"layers.{block}.{MODULE_OUTPUTS[suffix].module}.output", "none"
    kind, normalization = IN_BLOCK[suffix]
    return f"{kind}.{block}", normalization


def split(name: str) -> tuple[int | None, str]:
    """Return the block number in a name, None if it has none, and the rest of the name.

    >>> split("blocks.5.hook_mlp_out")
    (5, 'hook_mlp_out')
    """
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)
