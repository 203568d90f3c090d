"""TransformerLens's names of places, as our sites; SAELens, circuit-tracer and OpenMOSS write them, too."""

from __future__ import annotations

import re

from ..errors import CheckpointError, did_you_mean
from .norms import is_normed_again

IN_BLOCK = {
    "hook_resid_pre": ("resid_pre", "none"),
    "hook_resid_mid": ("resid_mid", "none"),
    "hook_resid_post": ("resid_post", "none"),
    "hook_attn_in": ("resid_pre", "none"),
    "hook_attn_out": ("attn_out", "none"),
    "hook_mlp_in": ("resid_mid", "none"),
    "hook_mlp_out": ("mlp_out", "none"),
    "attn.hook_z": ("attn_z", "none"),
    "mlp.hook_in": ("mlp_in", "none"),
    "mlp.hook_out": ("mlp_out", "none"),
    "mlp.hook_post": ("mlp_neurons", "none"),
    "ln1.hook_normalized": ("resid_pre", "rms_norm"),
    "ln2.hook_normalized": ("resid_mid", "rms_norm"),
}
"""Site and normalisation of each name inside a block.

``ln2.hook_normalized`` is the norm's output before its gain, which no module of transformers emits: it is the stream
before the norm, divided by its root mean square. ``hook_mlp_in`` is a copy of the stream, before the norm.
"""
GLOBAL = {"hook_embed": "embed"}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def place_of(name: str, layer: int | None = None, base_model: str | None = None) -> tuple[str, str]:
    """Return the site and the normalisation that a TransformerLens name means.

    Args:
        name: such as ``"blocks.12.hook_resid_post"``; or without the block if `layer` is given.
        layer: the block, where the name does not say.
        base_model: the model; in some what the MLP gives is not yet what it adds to the stream.

    Returns:
        The site, such as ``"resid_post.12"``, and one of the normalisations of `SAEConfig`.

    Raises:
        CheckpointError: if the name is unknown.

    >>> place_of("blocks.5.hook_mlp_out")
    ('mlp_out.5', 'none')
    >>> place_of("ln2.hook_normalized", layer=3)
    ('resid_mid.3', 'rms_norm')
    """
    if name in GLOBAL:
        return GLOBAL[name], "none"
    match = _BLOCK.fullmatch(name)
    block, suffix = (match[1], match[2]) if match else (layer, name)
    if block is None or suffix not in IN_BLOCK:
        raise CheckpointError(
            f"The checkpoint names the place {name!r}, which is unknown.{did_you_mean(suffix, IN_BLOCK)} Expected a "
            "place in a block, such as blocks.12.hook_resid_post."
        )
    if suffix == "mlp.hook_out" and is_normed_again(base_model):
        return f"layers.{block}.mlp.output", "none"
    kind, normalization = IN_BLOCK[suffix]
    return f"{kind}.{block}", normalization
